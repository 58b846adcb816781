/* lora_linear for at most 8 rows of x: bound by the bytes of W, so every byte is loaded once, 16 at a time, and looked
 * up once. A warp owns 32 rows of W and 128 columns a step. Lane (g, t) = (lane / 4, lane % 4) holds 32 neighbouring
 * codes, 16 bytes, of the rows g, g + 8, g + 16, g + 24. A byte's entry in the pair table is a word of two 16-bit
 * values, which is an operand of mma.sync as it is, whatever order the columns are in, as long as x's fragment has the
 * same one. So the tensor cores do what would be an unpacking and M multiply-adds for each element.
 *
 * 32 neighbouring elements that start at a multiple of 32 lie in one block of the format, also where blocks straddle
 * rows. For the sums to stay apart per block, x has two of the eight columns of B for each t: columns 2t and 2t + 1
 * hold two rows of x at the k of lanes t, and zeros at those of the others. The sums that lane (g, t) receives are then
 * those of its own 32 codes, and its own scale multiplies them: once per 32 elements. Where two (four) neighbouring t
 * always lie in one block they share four (eight) columns, for so many rows of x. Twice as many rows take two SETS
 * of columns; rows beyond that, which no usual shape has, read W again.
 *
 * The table has a copy per lane (32 KB): a lane reads its own bank, so no look-up conflicts with another. */
#include "lora.cuh"
#include "ptx.cuh"
#include "row_groups.cuh"
#include "scales.cuh"

namespace {
constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 32, STEP = 128, TEAM = THREADS / ROWS;
static_assert(TEAM == PK_GEMV_ROWS, "in the epilogue a row of W has a lane for each row of x");

__device__ const uint4 zeros[4] = {}; /* what lanes without a row of x multiply by */

struct Call {
    const void *x;
    const uint8_t *packed;
    PkScales scales;
    const float *s;
    const void *b, *bias;
    const float *gain; /* or NULL */
    void *y, *h;       /* h: with a gain, or NULL */
    float *parts; /* [splits][M][N], or NULL: y is written at once */
    int64_t N, K;
    int M, r, b_dtype, bias_dtype;
    int steps; /* of STEP columns, in a split */
    int share; /* 2^share neighbouring t lie in one block of the format */
    float scaling, unscale; /* unscale: 1 / what the table is multiplied by */
    PkRoutes routes;
};

/* The last steps: from h[member, n]. */
template <typename T> __device__ __forceinline__ void store(const Call &c, int64_t n, int member, float sum) {
    if (c.h) static_cast<T *>(c.h)[member * c.N + n] = pk_rounded<T>(sum);
    if (c.gain) sum *= __ldg(c.gain + n);
    if (c.bias) sum += pk_load_as(c.bias, c.bias_dtype, n);
    static_cast<T *>(c.y)[member * c.N + n] = pk_rounded<T>(sum);
}

/* y[member, n] = gain[n] * (sum + scaling * s[member] . b[n]) + bias[n]: a team of 8 lanes has row n of W, lane
 * `member` of it brings the sum of x's row `member`. Lanes of rows that do not exist only take part in the shuffles. */
template <typename T> __device__ __forceinline__ void finish(const Call &c, int64_t n, int member, float sum) {
    const bool real = n < c.N;
    float low[TEAM] = {};
    for (int j = member; j < c.r && real; j += TEAM) {
        const float b = pk_load_as(c.b, c.b_dtype, n * c.r + j);
#pragma unroll
        for (int m = 0; m < TEAM; ++m)
            if (m < c.M) low[m] += __ldg(c.s + m * c.r + j) * b;
    }
    float mine = 0.0f;
#pragma unroll
    for (int m = 0; m < TEAM; ++m) {
        if (m >= c.M || c.r == 0) continue; /* alike for all lanes */
#pragma unroll
        for (int d = TEAM / 2; d > 0; d /= 2) low[m] += __shfl_xor_sync(0xffffffffu, low[m], d);
        mine = m == member ? low[m] : mine;
    }
    if (!real || member >= c.M) return;
    store<T>(c, n, member, sum + c.scaling * mine);
}

/* The same where each row of x has its own part of b, [P, N]: a lane for each n and member, neighbours in n. DEPTH
 * loads are under way. */
template <typename T, int DEPTH>
__device__ __forceinline__ void finish(const Call &c, const PkRoute &route, int64_t n, int member, float sum) {
    if (n >= c.N || member >= c.M) return;
    float low = 0.0f;
    for (int j0 = 0; j0 < route.rank; j0 += DEPTH) {
        float b[DEPTH], s[DEPTH];
        pk_load_column<DEPTH>(c.b, c.b_dtype, (route.start + j0) * c.N + n, c.N, route.rank - j0, b);
        pk_load_column<DEPTH>(c.s + member * c.r, PK_F32, j0, 1, route.rank - j0, s);
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) low += s[j] * b[j];
    }
    store<T>(c, n, member, sum + route.scaling * low);
}

template <typename T> __device__ __forceinline__ void finish_any(const Call &c, int64_t n, int member, float sum) {
    if (!c.routes.adapters)
        finish<T>(c, n, member, sum);
    else if (n < c.N && member < c.M)
        finish<T, 4>(c, pk_route(c.routes, pk_adapter(c.routes, member)), n, member, sum);
}
/* Which of a block's rows of W, and which row of x, a thread finishes. */
__device__ __forceinline__ int row_of(const Call &c) {
    return static_cast<int>(c.routes.adapters ? threadIdx.x % ROWS : threadIdx.x / TEAM);
}
__device__ __forceinline__ int member_of(const Call &c) {
    return static_cast<int>(c.routes.adapters ? threadIdx.x / ROWS : threadIdx.x % TEAM);
}

template <typename T, int SETS, bool NESTED>
__global__ void __launch_bounds__(THREADS, SETS == 1 ? 2 : 1)
    gemv_kernel(const __grid_constant__ Call c, const __grid_constant__ PkTable values) {
    __shared__ uint4 table[256 * 8]; /* 32 words for each byte; later the sums of the warps */
    __shared__ float code[NESTED ? 256 : 1];
    __shared__ PkRoute routes[TEAM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int64_t n0 = static_cast<int64_t>(blockIdx.x) * ROWS;
    const int first = blockIdx.y * c.steps,
              last = static_cast<int>(min((c.K + STEP - 1) / STEP, int64_t(first) + c.steps));
    const float offset = NESTED ? *c.scales.offset : 0.0f;

    const uint8_t *rows[4];
    int64_t element[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) { /* rows past the end repeat the last one */
        element[i] = min(n0 + g + 8 * i, c.N - 1) * c.K;
        rows[i] = c.packed + element[i] / 2;
    }
    const int K = static_cast<int>(c.K);
    uint4 next[4];
    PkRawScale next_scale[4];
    auto fetch = [&](int step) { /* past the end of a row: its last codes again; x is zero there */
        const int k = min(step * STEP + 32 * t, K - 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            next[i] = pk_load_stream16(rows[i] + k / 2);
            next_scale[i] =
                pk_fetch_scale<NESTED>(c.scales, static_cast<uint32_t>((element[i] + k) >> c.scales.block_shift));
        }
    };
    fetch(min(first + warp, last - 1));
    {
        const uint32_t w = pk_pack<T>(values.value[threadIdx.x / 16], values.value[threadIdx.x % 16]);
#pragma unroll
        for (int k = 0; k < 8; ++k) table[threadIdx.x * 8 + ((k + threadIdx.x) & 7)] = {w, w, w, w};
        if (NESTED) code[threadIdx.x] = c.scales.nested_code[threadIdx.x];
        const int member = static_cast<int>(threadIdx.x);
        if (c.routes.adapters && member < c.M) /* now: at the end somebody would wait for it */
            routes[member] = pk_route(c.routes, pk_adapter(c.routes, member));
    }
    __syncthreads();

    const char *const entries = reinterpret_cast<const char *>(table);
    const uint32_t own = 4u * lane;
    auto look_up = [&](uint32_t word, int byte) { /* 128 bytes an entry */
        const uint32_t at = byte == 0 ? word << 7 : word >> (8 * byte - 7);
        return *reinterpret_cast<const uint32_t *>(entries + pk_and_or(at, 0x7f80u, own));
    };
    const int columns = 2 << c.share; /* of B for 2^share t */
    const char *x_rows[SETS];         /* NULL: this lane's column of B is zero at its k */
#pragma unroll
    for (int j = 0; j < SETS; ++j) {
        const int m = columns * j + g % columns;
        x_rows[j] = g / columns == t >> c.share && m < c.M
                        ? reinterpret_cast<const char *>(static_cast<const T *>(c.x) + m * c.K)
                        : nullptr;
    }
    float sums[2][SETS][4] = {};
    for (int step = first + warp; step < last; step += WARPS) {
        const int k = step * STEP + 32 * t;
        uint32_t w[4][4];
        float scale[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[i][0] = next[i].x, w[i][1] = next[i].y, w[i][2] = next[i].z, w[i][3] = next[i].w;
            scale[i] = pk_finish_scale<NESTED>(next_scale[i], code, offset);
            if (k >= K) scale[i] = 0.0f; /* 0 times the infinite scale of a block that is counted already is no 0 */
        }
        fetch(min(step + WARPS, last - 1));
        const char *from[SETS];
#pragma unroll
        for (int j = 0; j < SETS; ++j)
            from[j] = x_rows[j] && k < K ? x_rows[j] + 2 * k : reinterpret_cast<const char *>(zeros);
        float part[2][SETS][4] = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            uint32_t x[SETS][4];
#pragma unroll
            for (int j = 0; j < SETS; ++j) {
                const uint4 v = *reinterpret_cast<const uint4 *>(from[j] + 16 * q);
                x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const uint32_t upper = w[2 * tile][q], lower = w[2 * tile + 1][q];
                    const uint32_t a[4] = {look_up(upper, 2 * half), look_up(lower, 2 * half),
                                           look_up(upper, 2 * half + 1), look_up(lower, 2 * half + 1)};
#pragma unroll
                    for (int j = 0; j < SETS; ++j) {
                        const uint32_t b[2] = {x[j][2 * half], x[j][2 * half + 1]};
                        pk_mma<T>(part[tile][j], a, b);
                    }
                }
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int j = 0; j < SETS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[tile][j][e] += scale[2 * tile + e / 2] * part[tile][j][e];
    }

    __syncthreads(); /* the table's place is free */
    float *const shared = reinterpret_cast<float *>(table);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int j = 0; j < SETS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float v = sums[tile][j][e] * c.unscale;
                if (c.share < 1) v += __shfl_xor_sync(0xffffffffu, v, 1);
                if (c.share < 2) v += __shfl_xor_sync(0xffffffffu, v, 2);
                if (t >> c.share == 0)
                    shared[(warp * ROWS + 16 * tile + 8 * (e / 2) + g) * TEAM + columns * j + 2 * t + e % 2] = v;
            }
    __syncthreads();
    const int row = row_of(c), member = member_of(c);
    float sum = 0.0f;
    if (member < c.M)
        for (int i = 0; i < WARPS; ++i) sum += shared[(i * ROWS + row) * TEAM + member];
    if (!c.parts && c.routes.adapters)
        finish<T, 8>(c, routes[member], n0 + row, member, sum);
    else if (!c.parts)
        finish<T>(c, n0 + row, member, sum);
    else if (n0 + row < c.N && member < c.M)
        c.parts[(int64_t(blockIdx.y) * c.M + member) * c.N + n0 + row] = sum;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) finish_kernel(const __grid_constant__ Call c, int splits) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * ROWS + row_of(c);
    const int member = member_of(c);
    float sum = 0.0f;
    for (int p = 0; p < splits && n < c.N && member < c.M; ++p) sum += c.parts[(int64_t(p) * c.M + member) * c.N + n];
    finish_any<T>(c, n, member, sum);
}

/* Any K and any alignment, element by element: for shapes that no model has. A warp has a row of W. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    any_kernel(const __grid_constant__ Call c, const __grid_constant__ PkTable values) {
    __shared__ float table[16], code[256];
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 16) table[threadIdx.x] = values.value[threadIdx.x];
    code[threadIdx.x] = pk_scale_code(c.scales, static_cast<int>(threadIdx.x));
    const float offset = pk_scale_offset(c.scales);
    __syncthreads();
    const int64_t n = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    float sums[TEAM] = {};
    for (int64_t k = lane; k < c.K && n < c.N; k += 32) {
        const int64_t e = n * c.K + k;
        const float scale = pk_scale(c.scales, code, offset, e);
        const float w = __fmul_rn(table[(c.packed[e / 2] >> (e % 2 ? 0 : 4)) & 15], scale);
#pragma unroll
        for (int m = 0; m < TEAM; ++m)
            if (m < c.M) sums[m] += w * pk_float(static_cast<const T *>(c.x)[m * c.K + k]);
    }
    float mine = 0.0f;
#pragma unroll
    for (int m = 0; m < TEAM; ++m) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sums[m] += __shfl_xor_sync(0xffffffffu, sums[m], d);
        mine = m == lane % TEAM ? sums[m] : mine;
    }
    finish_any<T>(c, lane < TEAM ? n : c.N, lane % TEAM, mine); /* one team of the warp's four */
}

bool whole_runs(const pk_lora_args &a) {
    return a.K > 0 && a.K % 32 == 0 && pk_aligned(a.x, 16) && pk_aligned(a.weight, 16);
}

/* How many blocks share a row of W: enough blocks for a large GPU, a step for every warp, and the same on every GPU. */
int64_t splits_of(const pk_lora_args &a) {
    const int64_t blocks = (a.N + ROWS - 1) / ROWS, steps = (a.K + STEP - 1) / STEP;
    if (!whole_runs(a) || blocks >= 96) return 1;
    const int64_t wanted = (192 + blocks - 1) / blocks, most = steps / WARPS;
    return most < 1 ? 1 : (wanted < most ? wanted : most);
}

template <typename T, int SETS>
void launch(const Call &c, const PkTable &table, unsigned splits, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>((c.N + ROWS - 1) / ROWS), splits);
    auto kernel = !c.scales.nested_code ? gemv_kernel<T, SETS, false> : gemv_kernel<T, SETS, true>;
    PK_LAUNCH(kernel, grid, THREADS, stream, c, table);
}

template <typename T> void launch_all(const pk_lora_args &a, Call &c, cudaStream_t stream) {
    if (!whole_runs(a)) {
        auto kernel = any_kernel<T>;
        PK_LAUNCH(kernel, static_cast<unsigned>((c.N + WARPS - 1) / WARPS), THREADS, stream, c, pk_table_of(a.table));
        return;
    }
    const float factor = pk_table_factor(a.quant_type, a.x_dtype);
    const PkTable table = pk_table_of(a.table, factor);
    c.unscale = 1.0f / factor;
    const int64_t steps = (c.K + STEP - 1) / STEP, wanted = splits_of(a);
    c.steps = static_cast<int>((steps + wanted - 1) / wanted);
    const unsigned splits = static_cast<unsigned>((steps + c.steps - 1) / c.steps);
    c.parts = splits > 1 ? a.workspace : nullptr;
    for (c.share = 2; c.share > 0 && ((32 << c.share) > a.blocksize || c.K % (32 << c.share) != 0);) --c.share;
    const int most = 4 << c.share;
    for (int m = 0; m < a.M; m += most) {
        c.M = static_cast<int>(a.M - m < most ? a.M - m : most);
        c.x = static_cast<const T *>(a.x) + m * a.K, c.y = static_cast<T *>(a.y) + m * a.N, c.s = a.s + m * a.r;
        c.h = a.gain && a.h ? static_cast<T *>(a.h) + m * a.N : nullptr;
        c.routes.adapters = a.adapters ? a.adapters + m : nullptr;
        if (2 * c.M <= most)
            launch<T, 1>(c, table, splits, stream);
        else
            launch<T, 2>(c, table, splits, stream);
        if (splits == 1) continue;
        auto kernel = finish_kernel<T>;
        PK_LAUNCH(kernel, static_cast<unsigned>((c.N + ROWS - 1) / ROWS), THREADS, stream, c, static_cast<int>(splits));
    }
}
} // namespace

int64_t pk_lora_gemv_workspace(const pk_lora_args &a) {
    const int64_t splits = splits_of(a);
    return splits > 1 ? splits * a.M * a.N * 4 : 0;
}

int pk_lora_gemv(const pk_lora_args &a, cudaStream_t stream) {
    Call c = {};
    c.x = a.x, c.packed = static_cast<const uint8_t *>(a.weight), c.y = a.y;
    c.scales = pk_scales_of(a.absmax, a.nested_absmax, a.nested_code, a.offset, a.blocksize, a.nested_blocksize);
    c.s = a.s, c.b = a.b, c.bias = a.bias, c.gain = a.gain, c.h = a.gain ? a.h : nullptr;
    c.N = a.N, c.K = a.K, c.M = static_cast<int>(a.M), c.r = static_cast<int>(a.r);
    c.b_dtype = static_cast<int>(a.b_dtype), c.bias_dtype = static_cast<int>(a.bias_dtype);
    c.scaling = static_cast<float>(a.scaling), c.routes = pk_routes_of(a);
    if (a.x_dtype == PK_BF16)
        launch_all<__nv_bfloat16>(a, c, stream);
    else
        launch_all<__half>(a, c, stream);
    return pk_cuda_check(cudaGetLastError(), "lora_linear");
}
