/* r reflections as one update of rank r, y = x - s v with s = x u^T, and the gradients, all in float32.
 *
 * A warp has 4 rows of x, a lane 4 neighbouring columns of them, so that 4 elements of u or v serve 16
 * multiply-adds; ranks go 8 at a time. x is read a second time for y, from the cache. Where rows are few, several
 * warps share the columns of a row, and their sums meet in shared memory in the order of the warps. */
#include "rotate.cuh"

namespace {
constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 4, RANKS = 8, MOST = 64; /* reflections */

struct Update {
    const void *x;
    const float *u, *v;
    void *y;  /* NULL: only s */
    float *s; /* [M, r] */
    int64_t M, d;
    int r, beside; /* warps that share a row: 1, 2, 4 or 8 */
    bool fast;     /* d is a multiple of 4, storage aligned to four elements */
};

/* 32 numbers of each lane added over the lanes: lane i has the sum of the i-th. */
__device__ __forceinline__ float add_lanes(float (&v)[32]) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        const bool upper = threadIdx.x & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float other = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + half], half);
            v[i] = (upper ? v[i + half] : v[i]) + other;
        }
    }
    return v[0];
}

template <typename T> __global__ void __launch_bounds__(THREADS, 2) reflect_kernel(const __grid_constant__ Update c) {
    __shared__ float4 of_row[WARPS][MOST]; /* s of 4 rows, by rank */
    __shared__ float partial[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = warp / c.beside, part = warp % c.beside;
    const int64_t row = (int64_t(blockIdx.x) * (WARPS / c.beside) + rows) * ROWS, step = 128 * c.beside;
    const int64_t start = part * 128 + lane * 4;
    const T *const x = static_cast<const T *>(c.x) + row * c.d;
    const auto fetch = [&](int64_t at, float (&v)[ROWS][4]) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            pk_load4(x + i * c.d + at, row + i < c.M ? c.d - at : 0, c.fast && row + i < c.M, v[i]);
    };
    for (int r0 = 0; r0 < c.r; r0 += RANKS) {
        float sums[ROWS * RANKS] = {};
        for (int64_t at = start; at < c.d; at += step) {
            float v[ROWS][4];
            fetch(at, v);
#pragma unroll
            for (int j = 0; j < RANKS; ++j) {
                float u[4] = {};
                if (r0 + j < c.r) pk_load4(c.u + (r0 + j) * c.d + at, c.d - at, c.fast, u);
#pragma unroll
                for (int i = 0; i < ROWS; ++i)
#pragma unroll
                    for (int k = 0; k < 4; ++k) sums[i * RANKS + j] += v[i][k] * u[k];
            }
        }
        partial[warp][lane] = add_lanes(sums);
        __syncthreads();
        if (part == 0) { /* lane: row lane / RANKS, rank lane % RANKS */
            float sum = 0.0f;
            for (int i = 0; i < c.beside; ++i) sum += partial[warp + i][lane];
            const int j = r0 + lane % RANKS;
            const int64_t m = row + lane / RANKS;
            if (j < c.r) {
                reinterpret_cast<float *>(&of_row[rows][j])[lane / RANKS] = sum;
                if (m < c.M) c.s[m * c.r + j] = sum;
            }
        }
        __syncthreads();
    }
    if (!c.y) return;
    for (int64_t at = start; at < c.d; at += step) {
        float v[ROWS][4];
        fetch(at, v);
#pragma unroll 4
        for (int j = 0; j < c.r; ++j) {
            float w[4];
            pk_load4(c.v + j * c.d + at, c.d - at, c.fast, w);
            const float4 s = of_row[rows][j];
            const float each[ROWS] = {s.x, s.y, s.z, s.w};
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k) v[i][k] -= each[i] * w[k];
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            if (row + i < c.M) pk_store4(static_cast<T *>(c.y) + (row + i) * c.d + at, c.d - at, c.fast, v[i]);
    }
}

struct Gradient {
    const float *t; /* [M, r] */
    const void *x;
    float *out; /* [parts][r][d] */
    int64_t M, d, rows; /* rows of a part */
    int r;
    bool fast;
};

/* out[part] = -t^T x over a part of the rows: a lane has 4 columns and RANKS ranks, the warps take rows in turn. */
template <typename T>
__global__ void __launch_bounds__(THREADS, 2) reflect_gradient_kernel(const __grid_constant__ Gradient c) {
    __shared__ float shared[WARPS * 4 * RANKS * 32];
    constexpr int AHEAD = 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r0 = blockIdx.z * RANKS;
    const int64_t at = int64_t(blockIdx.x) * 128 + lane * 4;
    const int64_t first = int64_t(blockIdx.y) * c.rows, last = min(c.M, first + c.rows);
    float sums[RANKS * 4] = {};
    for (int64_t m0 = first + warp; m0 < last; m0 += AHEAD * WARPS) {
        float v[AHEAD][4], t[AHEAD][RANKS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int64_t m = m0 + i * WARPS, left = m < last ? c.d - at : 0;
            pk_load4(static_cast<const T *>(c.x) + m * c.d + at, left, c.fast && left > 0, v[i]);
#pragma unroll
            for (int j = 0; j < RANKS; ++j) t[i][j] = m < last && r0 + j < c.r ? __ldg(c.t + m * c.r + r0 + j) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
#pragma unroll
            for (int j = 0; j < RANKS; ++j)
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[j * 4 + k] -= t[i][j] * v[i][k];
    }
    pk_add_warps<WARPS>(sums, shared, [&](int i, int l, float sum) {
        const int64_t column = int64_t(blockIdx.x) * 128 + l * 4 + i % 4;
        if (r0 + i / 4 < c.r && column < c.d) c.out[(int64_t(blockIdx.y) * c.r + r0 + i / 4) * c.d + column] = sum;
    });
}

int check(const char *what, int64_t dtype, int64_t M, int64_t d, int64_t r) {
    if (int code = pk_rotation_check(what, dtype, M, d)) return code;
    if (r < 0 || r > MOST)
        return pk_fail(PK_ERR_ARGUMENT, "%s: r must be from 0 to %d, got %lld", what, MOST, static_cast<long long>(r));
    return PK_OK;
}
} // namespace

extern "C" int pk_cuda_householder_rotate(const void *x, const float *u, const float *v, int64_t dtype, int64_t M,
                                          int64_t d, int64_t r, void *y, float *s, int64_t device, void *stream) {
    const char *const what = "householder_rotate";
    if (int code = check(what, dtype, M, d, r)) return code;
    if (M == 0) return PK_OK;
    if ((d > 0 && (!x || (r > 0 && (!u || !v)))) || (r > 0 && !s))
        return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    Update c = {x, u, v, y, s, M, d, static_cast<int>(r), 1, false};
    const auto quad = [&](const void *p) { return pk_aligned(p, 4 * static_cast<uintptr_t>(pk_bytes(dtype))); };
    c.fast = d % 4 == 0 && quad(x) && quad(y) && pk_aligned(u, 16) && pk_aligned(v, 16);
    /* blocks for a large GPU: two on each multiprocessor */
    while (c.beside < WARPS && pk_ceil(M, WARPS / c.beside * ROWS) < 264 && c.beside * 128 < d) c.beside *= 2;
    const unsigned grid = static_cast<unsigned>(pk_ceil(M, WARPS / c.beside * ROWS));
    pk_by_dtype(dtype, [&](auto type) {
        const auto kernel = reflect_kernel<decltype(type)>;
        PK_LAUNCH(kernel, grid, THREADS, static_cast<cudaStream_t>(stream), c);
    });
    return pk_cuda_check(cudaGetLastError(), what);
}

extern "C" int pk_cuda_householder_gradient(const float *t, const void *x, int64_t dtype, int64_t M, int64_t d,
                                            int64_t r, float *out, int64_t parts, int64_t device, void *stream) {
    const char *const what = "householder_gradient";
    if (int code = check(what, dtype, M, d, r)) return code;
    if (parts < 1 || parts > 65535)
        return pk_fail(PK_ERR_ARGUMENT, "%s: parts must be from 1 to 65535, got %lld", what,
                       static_cast<long long>(parts));
    if (d == 0 || r == 0) return PK_OK;
    if (!out || (M > 0 && (!t || !x))) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    const Gradient c = {t, x, out, M, d, pk_ceil(M, parts), static_cast<int>(r),
                        d % 4 == 0 && pk_aligned(x, 4 * static_cast<uintptr_t>(pk_bytes(dtype)))};
    const dim3 grid(static_cast<unsigned>(pk_ceil(d, 128)), static_cast<unsigned>(parts),
                    static_cast<unsigned>(pk_ceil(r, RANKS)));
    pk_by_dtype(dtype, [&](auto type) {
        const auto kernel = reflect_gradient_kernel<decltype(type)>;
        PK_LAUNCH(kernel, grid, THREADS, static_cast<cudaStream_t>(stream), c);
    });
    return pk_cuda_check(cudaGetLastError(), what);
}
