/* |W + scaling b a|^2 of each row, W in 4 bits: dora_norm and squared_row_norms. W is read and decoded once, the rows
 * of W + scaling b a are added up as they are (r multiply-adds a weight, as many as W a^T takes), so no terms cancel.
 *
 * A warp has 4 rows and, in a step, 256 columns, 8 neighbours a lane: one word of codes a row, the next ones under way.
 * A part of a lies in shared memory for the 32 rows of a block. Squares are added in pairs of float32, whose sum has
 * the bits of float64 at the speed of float32; lanes meet in float64, always in the same order. */
#include <type_traits>

#include "groups.cuh"
#include "lora.cuh"
#include "ptx.cuh"
#include "scales.cuh"

namespace {
constexpr int THREADS = 256, WARPS = THREADS / 32, RT = 4, ROWS = WARPS * RT, COLUMNS = 256, RANKS = 16;
const char *const what = "squared_row_norms";

struct Call {
    const uint8_t *packed;
    PkScales scales;
    PkGroups groups;
    const void *a, *b;
    double *out; /* [parts][N] */
    int64_t N, K;
    int r, a_dtype, b_dtype;
    bool a_fast; /* rows of whole, aligned vectors */
    float scaling;
};

/* high + low += v, to twice float32's bits; high is the larger. */
__device__ __forceinline__ void add(float &high, float &low, float v) {
    const float sum = __fadd_rn(high, v), back = __fsub_rn(sum, high);
    low += __fadd_rn(__fsub_rn(high, __fsub_rn(sum, back)), __fsub_rn(v, back));
    high = sum;
}

/* The 8 weights of row n from column k on, zeros past the end, element by element: any K and alignment. */
template <bool GROUPS>
__device__ __forceinline__ void decode_any(const Call &c, const float *table, const float *code, float offset,
                                           int64_t n, int64_t k, float (&w)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        w[i] = 0.0f;
        if (n >= c.N || k + i >= c.K) continue;
        const int64_t e = n * c.K + k + i;
        const unsigned nibble = (c.packed[e / 2] >> (e % 2 ? 0 : 4)) & 15;
        if constexpr (GROUPS)
            w[i] = pk_group_value(c.groups, pk_group(c.groups, e >> c.scales.block_shift), nibble);
        else
            w[i] = __fmul_rn(table[nibble], pk_scale(c.scales, code, offset, e));
    }
}

/* ALIGNED: K is a multiple of 8 and words of codes are aligned, so that a lane's 8 weights are one of them. GROUPS:
 * integers by group. */
template <bool ALIGNED, bool ADAPTER, bool GROUPS>
__global__ void __launch_bounds__(THREADS, 2)
    norm_kernel(const __grid_constant__ Call c, const __grid_constant__ PkTable values) {
    __shared__ float table[16], code[256];
    __shared__ float4 a_part[ADAPTER ? RANKS * COLUMNS / 4 : 1]; /* [rank][first or second 4 of the 8][lane] */
    __shared__ float4 b_part[ADAPTER ? RANKS * WARPS : 1];       /* [rank][warp]: its 4 rows */
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x < 16) table[threadIdx.x] = values.value[threadIdx.x];
    code[threadIdx.x] = pk_scale_code(c.scales, static_cast<int>(threadIdx.x));
    const float offset = pk_scale_offset(c.scales);
    const int64_t n0 = static_cast<int64_t>(blockIdx.x) * ROWS + RT * warp;
    const int steps = static_cast<int>((c.K + COLUMNS - 1) / COLUMNS), parts = static_cast<int>(gridDim.y);
    const int first = static_cast<int>(int64_t(steps) * blockIdx.y / parts);
    const int last = static_cast<int>(int64_t(steps) * (blockIdx.y + 1) / parts);
    float high[RT] = {}, low[RT] = {};
    __syncthreads();
    for (int step = first; step < last; ++step) {
        const int64_t k = static_cast<int64_t>(step) * COLUMNS + 8 * lane;
        uint32_t raw[RT];
        std::conditional_t<GROUPS, PkGroup, PkRawScale> scale[RT];
        const bool real = k < c.K;
        if (ALIGNED && real) { /* asked for now, needed after the products */
#pragma unroll
            for (int i = 0; i < RT; ++i) { /* rows past the end repeat the last one */
                const int64_t e = min(n0 + i, c.N - 1) * c.K + k;
                raw[i] = __ldg(reinterpret_cast<const uint32_t *>(c.packed + e / 2));
                if constexpr (GROUPS)
                    scale[i] = pk_group(c.groups, e >> c.scales.block_shift);
                else
                    scale[i] = pk_fetch_scale(c.scales, static_cast<uint32_t>(e >> c.scales.block_shift));
            }
        }
        float update[RT][8] = {};
        for (int r0 = 0; ADAPTER && r0 < c.r; r0 += RANKS) {
            const int count = min(RANKS, c.r - r0);
            __syncthreads(); /* nobody needs the last part any more */
            for (int i = threadIdx.x; i < count * 32; i += THREADS) {
                const int64_t at = static_cast<int64_t>(step) * COLUMNS + 8 * (i % 32), left = c.K - at;
                float v[8];
                pk_load8_as(c.a, c.a_dtype, (r0 + i / 32) * c.K + at, left, c.a_fast && left > 0, v);
                a_part[i / 32 * 64 + i % 32] = make_float4(v[0], v[1], v[2], v[3]);
                a_part[i / 32 * 64 + 32 + i % 32] = make_float4(v[4], v[5], v[6], v[7]);
            }
            for (int i = threadIdx.x; i < count * WARPS; i += THREADS) {
                float v[RT];
#pragma unroll
                for (int row = 0; row < RT; ++row) {
                    const int64_t n = static_cast<int64_t>(blockIdx.x) * ROWS + RT * (i % WARPS) + row;
                    v[row] = n < c.N ? pk_load_as(c.b, c.b_dtype, n * c.r + r0 + i / WARPS) : 0.0f;
                }
                b_part[i] = make_float4(v[0], v[1], v[2], v[3]);
            }
            __syncthreads();
#pragma unroll 4
            for (int j = 0; j < count; ++j) {
                const float4 v = a_part[j * 64 + lane], u = a_part[j * 64 + 32 + lane], of = b_part[j * WARPS + warp];
                const float a[8] = {v.x, v.y, v.z, v.w, u.x, u.y, u.z, u.w}, b[RT] = {of.x, of.y, of.z, of.w};
#pragma unroll
                for (int row = 0; row < RT; ++row)
#pragma unroll
                    for (int i = 0; i < 8; ++i) update[row][i] = __fmaf_rn(b[row], a[i], update[row][i]);
            }
        }
        if (ALIGNED && !real) continue; /* the others are done, too, but for their sums */
#pragma unroll
        for (int row = 0; row < RT; ++row) {
            float w[8];
            if (ALIGNED) {
                float factor = 0.0f;
                if constexpr (!GROUPS) factor = pk_finish_scale(scale[row], code, offset);
#pragma unroll
                for (int i = 0; i < 8; ++i) { /* byte i / 2, the even element in its high nibble */
                    const unsigned nibble = raw[row] >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u;
                    if constexpr (GROUPS)
                        w[i] = pk_group_value(c.groups, scale[row], nibble);
                    else
                        w[i] = __fmul_rn(table[nibble], factor);
                }
            } else {
                decode_any<GROUPS>(c, table, code, offset, n0 + row, k, w);
            }
            if (ADAPTER) { /* to be rounded to float32: pairs from one lot of 8 to the next are enough */
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float v = __fmaf_rn(c.scaling, update[row][i], w[i]);
                    sum = __fmaf_rn(v, v, sum);
                }
                add(high[row], low[row], sum);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float square = __fmul_rn(w[i], w[i]);
                    low[row] += __fmaf_rn(w[i], w[i], -square); /* what rounding took from it */
                    add(high[row], low[row], square);
                }
            }
        }
    }
#pragma unroll
    for (int row = 0; row < RT; ++row) {
        double sum = static_cast<double>(high[row]) + static_cast<double>(low[row]);
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (lane == 0 && n0 + row < c.N) c.out[blockIdx.y * c.N + n0 + row] = sum;
    }
}

template <bool GROUPS> auto kernel_of(bool aligned, bool adapter) {
    if (adapter) return aligned ? norm_kernel<true, true, GROUPS> : norm_kernel<false, true, GROUPS>;
    return aligned ? norm_kernel<true, false, GROUPS> : norm_kernel<false, false, GROUPS>;
}
} // namespace

extern "C" int pk_cuda_squared_row_norms(const pk_lora_args *args, double *squares, int64_t parts, int64_t device,
                                         void *stream) {
    if (int code = pk_lora_check(args, what)) return code;
    const pk_lora_args &a = *args;
    if (parts < 1 || parts > 65535)
        return pk_fail(PK_ERR_ARGUMENT, "%s: parts must be from 1 to 65535, got %lld", what,
                       static_cast<long long>(parts));
    if (a.N == 0) return PK_OK;
    if (a.r > 0 && a.K > 0 && (!a.a || !a.b)) return pk_fail(PK_ERR_ARGUMENT, "%s: a or b is NULL", what);
    if (!squares) return pk_fail(PK_ERR_ARGUMENT, "%s: squares is NULL", what);
    if (a.N * a.K / a.blocksize >= int64_t(1) << 31)
        return pk_fail(PK_ERR_ARGUMENT, "%s: W has 2^31 blocks or more", what);
    if (int code = pk_cuda_use(device, what)) return code;
    Call c = {};
    c.packed = static_cast<const uint8_t *>(a.weight), c.out = squares, c.N = a.N, c.K = a.K;
    const bool groups = a.quant_type == PK_INT4;
    c.scales = pk_scales_of(a.absmax, a.nested_absmax, a.nested_code, a.offset, a.blocksize, a.nested_blocksize);
    if (groups) c.groups = pk_groups_of(a);
    c.a = a.a, c.b = a.b, c.r = static_cast<int>(a.r);
    c.a_dtype = static_cast<int>(a.a_dtype), c.b_dtype = static_cast<int>(a.b_dtype);
    c.a_fast = a.K % 8 == 0 && pk_aligned(a.a, 16), c.scaling = static_cast<float>(a.scaling);
    const bool aligned = a.K % 8 == 0 && pk_aligned(a.weight, 4);
    const PkTable table = pk_table_of(a);
    const auto kernel = groups ? kernel_of<true>(aligned, a.r > 0) : kernel_of<false>(aligned, a.r > 0);
    const dim3 grid(static_cast<unsigned>((a.N + ROWS - 1) / ROWS), static_cast<unsigned>(parts));
    PK_LAUNCH(kernel, grid, THREADS, static_cast<cudaStream_t>(stream), c, table);
    return pk_cuda_check(cudaGetLastError(), what);
}
