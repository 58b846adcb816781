/* The beginning and the end of the kernels of lora_gemv.cu: their arguments, and from the sums to y. */
#pragma once
#include "groups.cuh"
#include "lora.cuh"
#include "ptx.cuh"
#include "row_groups.cuh"
#include "scales.cuh"

namespace gemv {
constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 32, STEP = 128, TEAM = THREADS / ROWS;
static_assert(TEAM == PK_GEMV_ROWS, "in the epilogue a row of W has a lane for each row of x");

struct Layer { /* of one projection */
    const uint8_t *packed;
    PkScales scales;
    const float *s;
    const void *b, *bias;
    const float *gain; /* or NULL */
    void *y, *h;       /* h: with a gain, or NULL */
    float *parts;      /* [splits][M][N], with `arrived` */
    PkBeside beside;
    int64_t N;
    int r, b_dtype, bias_dtype;
    float scaling;
};
struct Call {
    Layer layer[PK_STACK];
    PkBlocks blocks;
    const void *x;
    unsigned *arrived; /* NULL, or where blocks share rows of W: per block x, zero */
    int64_t K;
    int M;
    int steps; /* of STEP columns, in a split */
    int share; /* 2^share neighbouring t lie in one block of the format */
    float unscale; /* 1 / what the table is multiplied by */
    PkRoutes routes;
};

/* The last steps: from h[member, n]. */
template <typename T> __device__ __forceinline__ void store(const Layer &l, int64_t n, int member, float sum) {
    if (l.h) static_cast<T *>(l.h)[member * l.N + n] = pk_rounded<T>(sum);
    if (l.gain) sum *= __ldg(l.gain + n);
    if (l.bias) sum += pk_load_as(l.bias, l.bias_dtype, n);
    static_cast<T *>(l.y)[member * l.N + n] = pk_rounded<T>(sum);
}

/* s[member] . b[n] over r columns: a team of 8 lanes has row n of W, each lane another member. Lanes of rows that do
 * not exist (not `real`) only take part in the shuffles. s is what the launch before this one wrote: by plain loads. */
__device__ __forceinline__ float low_rank(const Call &c, const float *s, const void *b, int b_dtype, int r, int64_t n,
                                          int member, bool real) {
    float low[TEAM] = {};
    for (int j = member; j < r && real; j += TEAM) {
        const float v = pk_load_as(b, b_dtype, n * r + j);
#pragma unroll
        for (int m = 0; m < TEAM; ++m)
            if (m < c.M) low[m] += s[m * r + j] * v;
    }
    float mine = 0.0f;
#pragma unroll
    for (int m = 0; m < TEAM; ++m) {
        if (m >= c.M || r == 0) continue; /* alike for all lanes */
#pragma unroll
        for (int d = TEAM / 2; d > 0; d /= 2) low[m] += __shfl_xor_sync(0xffffffffu, low[m], d);
        mine = m == member ? low[m] : mine;
    }
    return mine;
}

/* y[member, n] = gain[n] * (sum + scaling * s[member] . b[n]) + bias[n], where sum is that of x's row `member`. What
 * groups of integers have beside it is added by the same text. */
template <typename T>
__device__ __forceinline__ void finish(const Call &c, const Layer &l, int64_t n, int member, float sum) {
    const bool real = n < l.N;
#pragma unroll 1
    for (int beside = l.beside.count ? 1 : 0; beside >= 0; --beside) {
        const float low = low_rank(c, beside ? l.beside.sums : l.s, beside ? l.beside.c : l.b,
                                   beside ? int(PK_F32) : l.b_dtype, beside ? l.beside.count : l.r, n, member, real);
        sum += beside ? low : l.scaling * low;
    }
    if (real && member < c.M) store<T>(l, n, member, sum);
}

/* The same where each row of x has its own part of b, [P, N]: a lane for each n and member, neighbours in n. DEPTH
 * loads are under way. */
template <typename T, int DEPTH>
__device__ __forceinline__ void finish(const Layer &l, const PkRoute &route, int64_t n, int member, float sum) {
    float low = 0.0f;
    for (int j0 = 0; j0 < route.rank; j0 += DEPTH) {
        float b[DEPTH], s[DEPTH];
        pk_load_column<DEPTH>(l.b, l.b_dtype, (route.start + j0) * l.N + n, l.N, route.rank - j0, b);
        pk_load_column<DEPTH>(l.s + member * l.r, PK_F32, j0, 1, route.rank - j0, s);
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) low += s[j] * b[j];
    }
    for (int j = 0; j < l.beside.count; ++j)
        sum += l.beside.sums[member * l.beside.count + j] * __ldg(l.beside.c + n * l.beside.count + j);
    store<T>(l, n, member, sum + route.scaling * low);
}
/* Which of a block's rows of W, and which row of x, a thread finishes. */
__device__ __forceinline__ int row_of(const Call &c) {
    return static_cast<int>(c.routes.adapters ? threadIdx.x % ROWS : threadIdx.x / TEAM);
}
__device__ __forceinline__ int member_of(const Call &c) {
    return static_cast<int>(c.routes.adapters ? threadIdx.x / ROWS : threadIdx.x % TEAM);
}

/* Hands over this block's sums; true in the last block of these rows to arrive, which gets the sum of all, added in
 * their order whoever is last. The counter ends as it began. */
__device__ __forceinline__ bool add_parts(const Call &c, const Layer &l, unsigned *flag, int64_t n, int member,
                                          float &sum) {
    const bool real = n < l.N && member < c.M;
    float *const own = l.parts + member * l.N + n;
    const int64_t part = c.M * l.N;
    if (real) own[blockIdx.y * part] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *flag = atomicAdd(c.arrived + blockIdx.x, 1u) + 1 == gridDim.y;
        __threadfence();
        if (*flag) atomicExch(c.arrived + blockIdx.x, 0u);
    }
    __syncthreads();
    if (!*flag) return false;
    sum = 0.0f;
    for (unsigned p = 0; real && p < gridDim.y; ++p) sum += pk_load_fresh(own + p * part);
    return true;
}
} // namespace gemv
