/* dy W for at most PK_BACKWARD_ROWS rows of dy, in parts over the rows of W; lora_backward.cu adds them up. As in
 * lora_mma_tile.cuh W is decoded into the left operand of mma.sync, dx^T = W^T dy^T, by a table of pairs. Here a pair
 * lies in two rows of W, along which the sum goes: two instructions bring a nibble of each of two words together in
 * four bytes.
 *
 * Eight warps have 256 columns of W, four side by side, and 64 rows a step, two deep: a warp has 32 rows of 64 columns.
 * Lane (g, t) = (lane / 4, lane % 4) takes rows 8t .. 8t + 7 of 8 neighbouring columns, one word each, so of four
 * fragments of 16 columns and 32 rows; of a row of dy 16 bytes. Packed bytes and dy come by cp.async in 4 stages.
 *
 * A row of W has a scale of its own in every term of the sum, one for 64 columns. It multiplies dy (half an
 * instruction a weight at 64 rows of dy, in proportion to them), or pairs of weights where dy has not the range
 * (half an instruction, always). The scale is the sum of two 16-bit numbers, so that only the product is rounded:
 * rounded are the value of the code (by the mean-free table, see pk_table_factor) and that. Each thread prepares a
 * scale a step, for all of its warp. */
#include <type_traits>

#include "lora.cuh"
#include "pair_table.cuh"
#include "scales.cuh"
#include "splits.cuh"

namespace {
using mma::at;
using mma::HOLE;
using mma::LINE;
using mma::THREADS;
constexpr int WIDE = 4, DEEP = 2, ROWS = 32, STEP = ROWS * DEEP, COLUMNS = 64 * WIDE, STAGES = 4;
static_assert(32 * WIDE * DEEP == THREADS && STAGES * STEP == mma::LINES, "a line of codes for each row and stage");

/* The operand that the scale multiplies. GENERAL: weights that need not share a scale in 64 columns; dy and N of any
 * alignment. */
enum How { GRADIENTS, WEIGHTS, GENERAL };

struct Dx {
    const void *dy;
    const uint8_t *packed;
    PkScales scales;
    float *parts; /* [splits][M][K] */
    int64_t N, K;
    int M, steps;       /* steps of STEP rows of W in a split */
    uint32_t last_unit; /* of W; 64 elements, or 32 where GENERAL */
    int unit_shift;     /* log2 of the units in a block of the format */
    float unscale;      /* 1 / what the table is multiplied by */
    PkTable table;
};

template <int BM, How HOW> struct Layout {
    static constexpr int HALVES = HOW == GENERAL ? 2 : 1, UNIT = 64 / HALVES; /* columns that share a scale */
    static constexpr bool EXACT = HOW == GRADIENTS && BM <= 32;               /* the scale, of two numbers */
    static constexpr int DY = mma::LINES * LINE, DY_STAGE = BM * STEP * 2;
    static constexpr int SCALES = DY + STAGES * DY_STAGE, WARP_SCALES = 64 * HALVES * (EXACT ? 2 : 1);
    static constexpr int SCALES_STAGE = 8 * WARP_SCALES, CODE = SCALES + 2 * SCALES_STAGE;
    static constexpr int BYTES = CODE + 1024;
    static_assert(BYTES <= 99 << 10 && THREADS * BM * 4 <= BYTES, "what every GPU has; the end reuses it");
};

/* Line and place of 32 bytes of codes within a warp's part of a stage: rows 8 apart share a line, and what is
 * written or read together lies apart. */
__device__ __forceinline__ int codes_at(int warp, int row) {
    return (8 * warp + row % 8) * LINE + HOLE + (row / 8 ^ (warp & 1) ^ 2 * (row & 1)) * 32;
}

/* A thread brings in two chunks of 16 bytes of a row of codes, and of dy BM / 32; past `end` (of the rows of W)
 * zeros, and past the last column. `step` counts from the last advance(). */
template <typename T, int BM, How HOW> struct Loader {
    using L = Layout<BM, HOW>;
    static constexpr int DY_CHUNKS = (BM + 31) / 32;
    const uint8_t *codes, *dy[DY_CHUNKS];
    int64_t stride;
    int codes_to, dy_to, left[2], dy_left; /* rows of W to the end */

    __device__ __forceinline__ Loader(const Dx &in, int k0, int m0, int n0, int end) {
        const int tid = static_cast<int>(threadIdx.x);
        {
            const int row = tid / 4, chunk = tid % 4; /* and chunk + 4 */
            const int64_t k = static_cast<int64_t>(k0) + 32 * chunk;
            codes = in.packed + (n0 + row) * (in.K / 2) + k / 2, stride = STEP * (in.K / 2);
            codes_to = codes_at(row / ROWS * WIDE + chunk / 2, row % ROWS) + chunk % 2 * 16;
#pragma unroll
            for (int j = 0; j < 2; ++j) left[j] = k + 128 * j < in.K ? end - n0 - row : 0;
        }
        const int row = tid / 8, chunk = tid % 8;
        dy_left = end - n0 - 8 * chunk;
        dy_to = L::DY + row * 128 + (chunk ^ 4 * (row & 1)) * 16;
#pragma unroll
        /* rows of dy past the end repeat the last one, and nobody reads their sums */
        for (int j = 0; j < DY_CHUNKS; ++j)
            dy[j] =
                static_cast<const uint8_t *>(in.dy) + (min(m0 + row + 32 * j, in.M - 1) * in.N + n0 + 8 * chunk) * 2;
    }
    __device__ __forceinline__ void load(char *shared, int step) {
        const int stage = step % STAGES;
#pragma unroll
        for (int j = 0; j < 2; ++j)
            pk_cp_async16(shared + codes_to + (stage * STEP + j * 16) * LINE, codes + 64 * j, left[j] > step * STEP);
        codes += stride;
#pragma unroll
        for (int j = 0; j < DY_CHUNKS; ++j) {
            char *const to = shared + dy_to + stage * L::DY_STAGE + j * 32 * 128;
            const uint8_t *const from = dy[j] + step * STEP * 2;
            if (BM < 32 && threadIdx.x >= 8 * BM) continue;
            if constexpr (HOW == GENERAL)
                for (int i = 0; i < 8; ++i)
                    at<uint16_t>(to, 2 * i) =
                        i < dy_left - step * STEP ? __ldg(reinterpret_cast<const uint16_t *>(from) + i) : 0;
            else
                pk_cp_async16(to, from, dy_left > step * STEP);
        }
    }
    __device__ __forceinline__ void advance(int steps) {
        left[0] -= steps * STEP, left[1] -= steps * STEP, dy_left -= steps * STEP;
#pragma unroll
        for (int j = 0; j < DY_CHUNKS; ++j) pk_advance(dy[j], steps * STEP * 2);
    }
};

/* A thread's own scale a step: asked for two steps before it goes to shared memory, one before it is used. Past the
 * end of the rows it is the last one of the same columns, for a dy of zero. */
template <typename T, int BM, How HOW> struct Scaler {
    using L = Layout<BM, HOW>;
    PkRawScale raw[2][L::HALVES];
    uint32_t unit[L::HALVES], last[L::HALVES], step;
    int to;
    float offset;

    __device__ __forceinline__ Scaler(const Dx &in, int k0, int n0, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
        for (int h = 0; h < L::HALVES; ++h) {
            const int64_t k = min(static_cast<int64_t>(k0) + 64 * (warp % WIDE) + 32 * h, in.K - L::UNIT);
            unit[h] = static_cast<uint32_t>(((n0 + warp / WIDE * ROWS + lane) * in.K + k) / L::UNIT);
            last[h] = static_cast<uint32_t>(((end - 1) * in.K + k) / L::UNIT);
        }
        step = static_cast<uint32_t>(STEP * in.K / L::UNIT);
        to = L::SCALES + warp * L::WARP_SCALES + 2 * lane;
        offset = pk_scale_offset(in.scales) * in.unscale;
    }
    __device__ __forceinline__ void fetch(const Dx &in, int slot) {
#pragma unroll
        for (int h = 0; h < L::HALVES; ++h) {
            const uint32_t block = min(unit[h], last[h]) >> in.unit_shift;
            raw[slot][h] = {pk_load_now(in.scales.values + (block >> in.scales.outer_shift)),
                            pk_load_now(in.scales.codes + block)};
            unit[h] += step;
        }
    }
    __device__ __forceinline__ void finish(char *shared, int slot) {
#pragma unroll
        for (int h = 0; h < L::HALVES; ++h) {
            const float v = pk_finish_scale(raw[slot][h], &at<float>(shared, L::CODE), offset);
            const int own = to + slot * L::SCALES_STAGE + L::WARP_SCALES / L::HALVES * h;
            const uint32_t high = pk_pack<T>(v, 0.0f);
            at<uint16_t>(shared, own) = static_cast<uint16_t>(high);
            if constexpr (L::EXACT) {
                float first[2];
                pk_unpack<T>(high, first);
                /* of an infinite scale no NaN, but again an infinite one */
                const float rest = fminf(__fsub_rn(v, first[0]), fabsf(v));
                at<uint16_t>(shared, own + 64) = static_cast<uint16_t>(pk_pack<T>(rest, 0.0f));
            }
        }
    }
};

/* of columns 8g + 2f, 8g + 2f + 1; rows of dy 8i + 2t, 8i + 2t + 1 */
template <int BM> using Sums = float[4][BM / 8][4];

/* The scales of eight rows of W, in pairs. */
template <bool EXACT> struct Eight {
    uint32_t high[4], low[4];
    __device__ __forceinline__ Eight(char *shared, int scale) {
        const uint4 v = at<uint4>(shared, scale), rest = EXACT ? at<uint4>(shared, scale + 64) : v;
        high[0] = v.x, high[1] = v.y, high[2] = v.z, high[3] = v.w;
        low[0] = rest.x, low[1] = rest.y, low[2] = rest.z, low[3] = rest.w;
    }
    template <typename T> __device__ __forceinline__ uint32_t times(uint32_t a, int pair) const {
        return EXACT ? pk_fma2<T>(a, high[pair], pk_mul2<T>(a, low[pair])) : pk_mul2<T>(a, high[pair]);
    }
};

/* sums += W^T dy^T over 32 rows of W. The offsets are of the thread's own; codes: of its even and its odd rows. */
template <typename T, int BM, How HOW>
__device__ __forceinline__ void multiply(char *shared, Sums<BM> &sums, const int (&codes)[2], int dy, int scale,
                                         uint32_t copy) {
    const Eight<Layout<BM, HOW>::EXACT> scales(shared, scale);
    uint32_t a[2][4][4]; /* of 16 rows of W, fragments of 16 columns */
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const uint32_t upper = at<uint32_t>(shared, codes[0] + 2 * pair * LINE);
        const uint32_t lower = at<uint32_t>(shared, codes[1] + 2 * pair * LINE);
        const uint32_t even = pk_blend(upper, lower >> 4, 0xf0f0f0f0u), odd = pk_blend(upper << 4, lower, 0xf0f0f0f0u);
#pragma unroll
        for (int f = 0; f < 4; ++f)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const uint32_t v = mma::look_up(shared, side ? odd : even, f, copy);
                a[pair / 2][f][pair % 2 * 2 + side] = HOW == GRADIENTS ? v : scales.template times<T>(v, pair);
            }
    }
#pragma unroll
    for (int i = 0; i < BM / 8; ++i) {
        const uint4 v = at<uint4>(shared, dy + i * 1024);
        const uint32_t b[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t scaled[2] = {b[2 * h], b[2 * h + 1]};
            if constexpr (HOW == GRADIENTS)
#pragma unroll
                for (int j = 0; j < 2; ++j) scaled[j] = scales.template times<T>(scaled[j], 2 * h + j);
#pragma unroll
            for (int f = 0; f < 4; ++f) pk_mma<T>(sums[f][i], a[h][f], scaled);
        }
    }
}

template <typename T, int BM, How HOW>
__global__ void __launch_bounds__(THREADS, 1) dx_kernel(const __grid_constant__ Dx in) {
    using L = Layout<BM, HOW>;
    PK_DYNAMIC_SHARED(char, shared);
    const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, g = lane / 4, t = lane % 4;
    const int warp = tid / 32, wide = warp % WIDE, deep = warp / WIDE; /* of the warp's columns and rows */
    const int k0 = blockIdx.x * COLUMNS, m0 = blockIdx.z * BM, n0 = blockIdx.y * in.steps * STEP;
    const int end = static_cast<int>(min(in.N, n0 + static_cast<int64_t>(in.steps) * STEP));

    Loader<T, BM, HOW> loader(in, k0, m0, n0, end);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) loader.load(shared, i), pk_cp_async_commit();
    Scaler<T, BM, HOW> scaler(in, k0, n0, end);
    scaler.fetch(in, 0), scaler.fetch(in, 1);
    at<float>(shared, L::CODE + 4 * tid) = pk_scale_code(in.scales, tid) * in.unscale;
    mma::fill_table<T>(shared, in.table);
    __syncthreads();
    scaler.finish(shared, 0), scaler.fetch(in, 0);

    Sums<BM> sums = {};
    const int own_codes[2] = {codes_at(warp, 8 * t) + 4 * g, codes_at(warp, 8 * t + 1) + 4 * g};
    const int own_dy = L::DY + g * 128 + ((4 * deep + t) ^ 4 * (g & 1)) * 16;
    const int own_scale = L::SCALES + warp * L::WARP_SCALES + (HOW == GENERAL ? g / 4 * 64 : 0) + 16 * t;
    for (int left = end - n0; left > 0; left -= STAGES * STEP) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) { /* so that a stage's places are constants */
            if (s > 0 && left <= s * STEP) break;
            pk_cp_async_wait<STAGES - 2>();
            __syncthreads(); /* stage s and its scales are there, and nobody reads stage s - 1 any more */
            loader.load(shared, s + STAGES - 1), pk_cp_async_commit();
            if (s == STAGES - 1) loader.advance(STAGES);
            scaler.finish(shared, (s + 1) % 2), scaler.fetch(in, (s + 1) % 2);
            const int codes[2] = {own_codes[0] + s * STEP * LINE, own_codes[1] + s * STEP * LINE};
            multiply<T, BM, HOW>(shared, sums, codes, own_dy + s * L::DY_STAGE, own_scale + s % 2 * L::SCALES_STAGE,
                                 4 * lane);
        }
    }
    pk_cp_async_wait<0>();
    __syncthreads();
    /* of the fragments of a warp and the one below it, each adds up two */
    const int place = tid % (32 * WIDE) * 16;
    constexpr int FRAGMENT = 32 * WIDE * 16;
#pragma unroll
    for (int f = 0; f < 2; ++f)
#pragma unroll
        for (int i = 0; i < BM / 8; ++i) {
            const float(&up)[4] = sums[f][i], (&down)[4] = sums[f + 2][i];
            at<float4>(shared, place + ((deep * 2 + f) * (BM / 8) + i) * FRAGMENT) =
                deep ? make_float4(up[0], up[1], up[2], up[3]) : make_float4(down[0], down[1], down[2], down[3]);
        }
    __syncthreads();
    const int64_t k = static_cast<int64_t>(k0) + 64 * wide + 8 * g + 4 * deep;
    if (k >= in.K) return;
#pragma unroll
    for (int i = 0; i < BM / 8; ++i) {
        float own[2][4];
#pragma unroll
        for (int f = 0; f < 2; ++f) {
            const float4 v = at<float4>(shared, place + (((1 - deep) * 2 + f) * (BM / 8) + i) * FRAGMENT);
            const float other[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) own[f][e] = (deep ? sums[f + 2][i][e] : sums[f][i][e]) + other[e];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int m = m0 + 8 * i + 2 * t + j;
            if (m < in.M)
                *reinterpret_cast<float4 *>(in.parts + (static_cast<int64_t>(blockIdx.y) * in.M + m) * in.K + k) =
                    make_float4(own[0][j], own[0][2 + j], own[1][j], own[1][2 + j]);
        }
    }
}

/* Any shape and alignment, element by element: a thread has a column of ANY_ROWS rows of dy. */
constexpr int ANY_ROWS = 8;
template <typename T> __global__ void __launch_bounds__(THREADS) any_kernel(const __grid_constant__ Dx in) {
    __shared__ float table[16], map[256];
    if (threadIdx.x < 16) table[threadIdx.x] = in.table.value[threadIdx.x];
    map[threadIdx.x] = pk_scale_code(in.scales, static_cast<int>(threadIdx.x));
    const float offset = pk_scale_offset(in.scales);
    __syncthreads();
    const int64_t k = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const int m0 = blockIdx.z * ANY_ROWS;
    const int64_t last = min(in.N, (int64_t(blockIdx.y) + 1) * in.steps * STEP);
    if (k >= in.K) return;
    float sums[ANY_ROWS] = {};
    for (int64_t n = int64_t(blockIdx.y) * in.steps * STEP; n < last; ++n) {
        const int64_t e = n * in.K + k;
        const float scale = pk_scale(in.scales, map, offset, e);
        const float w = pk_float(pk_rounded<T>(__fmul_rn(table[(in.packed[e / 2] >> (e % 2 ? 0 : 4)) & 15], scale)));
#pragma unroll
        for (int m = 0; m < ANY_ROWS; ++m)
            if (m0 + m < in.M) sums[m] += w * pk_float(static_cast<const T *>(in.dy)[(m0 + m) * in.N + n]);
    }
#pragma unroll
    for (int m = 0; m < ANY_ROWS; ++m)
        if (m0 + m < in.M) in.parts[(int64_t(blockIdx.y) * in.M + m0 + m) * in.K + k] = sums[m];
}

bool by_chunks(const pk_lora_args &a) { /* of 32 codes; fewer than 2^31 units */
    return a.N > 0 && a.K % 32 == 0 && a.N * a.K / 32 < int64_t(1) << 31 && pk_aligned(a.weight, 16);
}
bool whole(const pk_lora_args &a) { return a.K % 64 == 0 && a.blocksize >= 64 && a.N % 8 == 0 && pk_aligned(a.dy, 16); }

template <typename T, int BM, How HOW>
void launch(Dx &in, const pk_lora_args &a, unsigned splits, cudaStream_t stream) {
    using L = Layout<BM, HOW>;
    const float factor = pk_table_factor(a.quant_type, a.x_dtype);
    in.table = pk_table_of(a, factor), in.unscale = 1.0f / factor;
    in.last_unit = static_cast<uint32_t>((a.N * a.K - 1) / L::UNIT), in.unit_shift = pk_log2(a.blocksize / L::UNIT);
    auto kernel = dx_kernel<T, BM, HOW>;
    const dim3 grid(static_cast<unsigned>(pk_ceil_div(a.K, COLUMNS)), splits, (in.M + BM - 1) / BM);
    PK_LAUNCH_SHARED(kernel, grid, THREADS, L::BYTES, stream, in);
}

template <typename T> void launch_all(Dx &in, const pk_lora_args &a, unsigned splits, cudaStream_t stream) {
    /* small gradients times scales are too small for float16 */
    constexpr How USUAL = std::is_same_v<T, __half> ? WEIGHTS : GRADIENTS;
    if (!by_chunks(a)) {
        in.table = pk_table_of(a);
        auto kernel = any_kernel<T>;
        const dim3 grid(static_cast<unsigned>(pk_ceil_div(a.K, THREADS)), splits, (in.M + ANY_ROWS - 1) / ANY_ROWS);
        PK_LAUNCH(kernel, grid, THREADS, stream, in);
    } else if (!whole(a)) {
        launch<T, 32, GENERAL>(in, a, splits, stream);
    } else if (a.M <= 16) {
        launch<T, 16, USUAL>(in, a, splits, stream);
    } else if (a.M <= 32) {
        launch<T, 32, USUAL>(in, a, splits, stream);
    } else {
        launch<T, 64, USUAL>(in, a, splits, stream);
    }
}
} // namespace

int pk_lora_dx_splits(const pk_lora_args &a) {
    const int64_t steps = pk_ceil_div(a.N, STEP), rows = a.M <= 16 ? 16 : a.M <= 32 ? 32 : 64;
    const int64_t step = pk_step_clocks(rows, COLUMNS, STEP, pk_small_gpu());
    const int64_t wanted = pk_splits({pk_ceil_div(a.K, COLUMNS), steps, step, rows * COLUMNS * 4}, PkAdds::APART).parts;
    return static_cast<int>(steps ? pk_ceil_div(steps, pk_ceil_div(steps, wanted)) : 1);
}

int pk_lora_dx(const pk_lora_args &a, float *parts, cudaStream_t stream) {
    const int splits = pk_lora_dx_splits(a);
    Dx in = {};
    in.dy = a.dy, in.packed = static_cast<const uint8_t *>(a.weight), in.parts = parts;
    in.scales = pk_scales_of(a.absmax, a.nested_absmax, a.nested_code, a.offset, a.blocksize, a.nested_blocksize);
    in.N = a.N, in.K = a.K, in.M = static_cast<int>(a.M);
    in.steps = static_cast<int>(pk_ceil_div(pk_ceil_div(a.N, STEP), splits));
    if (a.x_dtype == PK_BF16)
        launch_all<__nv_bfloat16>(in, a, static_cast<unsigned>(splits), stream);
    else
        launch_all<__half>(in, a, static_cast<unsigned>(splits), stream);
    return pk_cuda_check(cudaGetLastError(), "lora_linear_backward");
}
