/* dequantize_4bit on the GPU: bound by the bytes that it writes, so the layout follows the stores. A thread takes 4
 * packed bytes, 8 elements, one aligned 16-byte store of the 16-bit types (two of float32); neighbouring threads take
 * neighbouring words. The table lies in shared memory (16 floats in 16 banks: no conflicts). Integers by group, whose
 * rows begin groups, have a kernel of their own. */
#include "common.cuh"
#include "groups.cuh"
#include "ptx.cuh"
#include "scales.cuh"

namespace {
constexpr int THREADS = 256;
constexpr int WORDS = 4;  /* independent words per thread and round, to have that many loads under way */
constexpr int BLOCKS = 6; /* that a multiprocessor holds */

struct Call {
    const uint8_t *packed;
    PkScales scales;
    PkTable values;
    int64_t numel;
};

/* The four values of the nibbles whose offsets in the table are the bytes of `offsets`, lowest first. */
__device__ __forceinline__ void look_up(const float *table, uint32_t offsets, float (&v)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
        v[k] =
            *reinterpret_cast<const float *>(reinterpret_cast<const char *>(table) + pk_prmt(offsets, 0, 0x4440 | k));
}

__device__ __forceinline__ void store8(float *to, const float (&v)[8]) {
    reinterpret_cast<float4 *>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4 *>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T> __device__ __forceinline__ void store8(T *to, const float (&v)[8]) { /* the 16-bit types */
    *reinterpret_cast<uint4 *>(to) = {pk_pack<T>(v[0], v[1]), pk_pack<T>(v[2], v[3]), pk_pack<T>(v[4], v[5]),
                                      pk_pack<T>(v[6], v[7])};
}

/* N words of 8 elements, THREADS apart, from `first` on. ALIGNED: packed to 4 bytes and out to 16. */
template <typename T, bool ALIGNED, int N>
__device__ __forceinline__ void words_of(const Call &c, const float *table, const float *code, float offset,
                                         uint32_t first, T *__restrict__ out) {
    uint32_t raw[N];
    PkRawScale scale[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
        const uint32_t word = first + u * THREADS;
        if (ALIGNED) {
            raw[u] = __ldg(reinterpret_cast<const uint32_t *>(c.packed) + word);
        } else {
            raw[u] = 0;
            for (int k = 0; k < 4; ++k) raw[u] |= static_cast<uint32_t>(c.packed[4 * int64_t(word) + k]) << (8 * k);
        }
        scale[u] = pk_fetch_scale(c.scales, word >> (c.scales.block_shift - 3)); /* a block holds whole words */
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
        const int64_t i = 8 * int64_t(first + u * THREADS);
        const float factor = pk_finish_scale(scale[u], code, offset);
        float even[4], odd[4], v[8]; /* the even elements are in the high nibbles */
        look_up(table, raw[u] >> 2 & 0x3c3c3c3cu, even);
        look_up(table, raw[u] << 2 & 0x3c3c3c3cu, odd);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[2 * k] = __fmul_rn(even[k], factor), v[2 * k + 1] = __fmul_rn(odd[k], factor);
        if (ALIGNED) {
            store8(out + i, v);
        } else {
            for (int k = 0; k < 8; ++k) out[i + k] = pk_rounded<T>(v[k]);
        }
    }
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    dequantize_kernel(const __grid_constant__ Call c, T *__restrict__ out) {
    __shared__ float table[16], code[256];
    if (threadIdx.x < 16) table[threadIdx.x] = c.values.value[threadIdx.x];
    code[threadIdx.x] = pk_scale_code(c.scales, static_cast<int>(threadIdx.x));
    const float offset = pk_scale_offset(c.scales);
    __syncthreads();
    const uint32_t words = static_cast<uint32_t>(c.numel / 8), last = (WORDS - 1) * THREADS; /* words: below 2^31 */
    uint32_t word = blockIdx.x * THREADS * WORDS + threadIdx.x;
    for (; word + last < words; word += gridDim.x * THREADS * WORDS)
        words_of<T, ALIGNED, WORDS>(c, table, code, offset, word, out);
    for (int u = 0; u < WORDS; ++u, word += THREADS) /* of the one block that has the end */
        if (word < words) words_of<T, ALIGNED, 1>(c, table, code, offset, word, out);
    const int64_t i = 8 * int64_t(words) + threadIdx.x;
    if (blockIdx.x == 0 && i < c.numel) {
        const unsigned nibble = (c.packed[i / 2] >> (i % 2 ? 0 : 4)) & 15u;
        out[i] = pk_rounded<T>(__fmul_rn(table[nibble], pk_scale(c.scales, code, offset, i)));
    }
}

template <typename T>
void launch(const uint8_t *packed, const PkScales &scales, const PkTable &values, int64_t numel, void *out,
            int64_t device, cudaStream_t stream) {
    const Call c = {packed, scales, values, numel};
    const int64_t per_block = int64_t(THREADS) * WORDS * 8;
    int processors = 108;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, static_cast<int>(device));
    /* as many blocks as run at once: each reads the code of the scales once */
    const unsigned grid = pk_grid((numel + per_block - 1) / per_block, int64_t(processors) * BLOCKS);
    const bool aligned = pk_aligned(packed, 4) && pk_aligned(out, 16);
    const auto kernel = aligned ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
    PK_LAUNCH(kernel, grid, THREADS, stream, c, static_cast<T *>(out));
}

/* Integers by group: a block has ROW columns of a row. The groups of columns may be given by an index. */
constexpr int ROW_THREADS = 128, ROW = 8 * ROW_THREADS;
struct Rows {
    const uint8_t *packed;
    PkGroups parts;
    const int32_t *index; /* [K], or NULL */
    int64_t K, size, groups;
    unsigned blocks; /* of a row */
};

/* WORDS: a thread's 8 elements are an aligned word of codes, in one group, and an aligned store. */
template <typename T, bool WORDS>
__global__ void __launch_bounds__(ROW_THREADS) rows_kernel(const __grid_constant__ Rows c, T *__restrict__ out) {
    const int64_t n = blockIdx.x / c.blocks, k = int64_t(blockIdx.x % c.blocks) * ROW + 8 * threadIdx.x;
    if (k >= c.K) return;
    const int64_t e = n * c.K + k;
    float v[8];
    if constexpr (WORDS) {
        const uint32_t raw = __ldg(reinterpret_cast<const uint32_t *>(c.packed + e / 2));
        const int64_t at = n * c.groups + static_cast<uint32_t>(k) / static_cast<uint32_t>(c.size);
        const PkGroup group = pk_group(c.parts, at);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = pk_group_value(c.parts, group, raw >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u);
        store8(out + e, v);
    } else {
        for (int i = 0; i < 8 && k + i < c.K; ++i) {
            const unsigned nibble = (c.packed[(e + i) / 2] >> ((e + i) % 2 ? 0 : 4)) & 15u;
            const int64_t g = c.index ? __ldg(c.index + k + i) : (k + i) / c.size;
            const bool known = g >= 0 && g < c.groups; /* NaN where the index was overwritten */
            const PkGroup nothing = {__uint_as_float(0x7fc00000u), 0.0f, 0.0f};
            const PkGroup group = known ? pk_group(c.parts, n * c.groups + g) : nothing;
            out[e + i] = pk_rounded<T>(pk_group_value(c.parts, group, nibble));
        }
    }
}

template <typename T> void launch_rows(const Rows &c, int64_t N, void *out, cudaStream_t stream) {
    const bool words = c.K % 8 == 0 && c.size % 8 == 0 && !c.index && pk_aligned(c.packed, 4) && pk_aligned(out, 16);
    const auto kernel = words ? rows_kernel<T, true> : rows_kernel<T, false>;
    PK_LAUNCH(kernel, static_cast<unsigned>(N * c.blocks), ROW_THREADS, stream, c, static_cast<T *>(out));
}
} // namespace

extern "C" int pk_cuda_dequantize_rows(const pk_lora_args *args, int64_t out_dtype, void *out, int64_t device,
                                       void *stream) {
    const char *what = "dequantize_rows";
    const auto is_float = [](int64_t dtype) { return dtype == PK_F32 || dtype == PK_BF16 || dtype == PK_F16; };
    const auto fail = [what](const char *text, int64_t got) {
        return pk_fail(PK_ERR_ARGUMENT, "%s: %s, got %lld", what, text, static_cast<long long>(got));
    };
    if (!args) return pk_fail(PK_ERR_ARGUMENT, "%s: no arguments", what);
    const pk_lora_args &a = *args;
    if (a.quant_type != PK_INT4) return fail("the weight must be int4", a.quant_type);
    if (!is_float(out_dtype)) return fail("out_dtype must be float32, bfloat16 or float16", out_dtype);
    if (!is_float(a.w_dtype)) return fail("scales must be float32, bfloat16 or float16", a.w_dtype);
    if (a.nested_absmax && a.nested_blocksize != PK_U8 && a.nested_blocksize != a.w_dtype)
        return fail("zeros must be uint8 or of the dtype of scales", a.nested_blocksize);
    if (a.blocksize < 1) return fail("blocksize must be at least 1", a.blocksize);
    if (a.N < 0 || a.K < 0 || a.K > INT32_MAX) return fail("N and K must be from 0, K below 2^31", a.N < 0 ? a.N : a.K);
    if (a.N == 0 || a.K == 0) return PK_OK;
    if (!a.weight || !a.absmax || !out) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    const int64_t blocks = (a.K + ROW - 1) / ROW;
    if (a.N > INT32_MAX / blocks) return fail("N must be below 2^31 / ceil(K / 1024)", a.N);
    if (int code = pk_cuda_use(device, what)) return code;
    const Rows c = {static_cast<const uint8_t *>(a.weight), pk_groups_of(a),
                    reinterpret_cast<const int32_t *>(a.nested_code), a.K, a.blocksize,
                    (a.K + a.blocksize - 1) / a.blocksize, static_cast<unsigned>(blocks)};
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (out_dtype == PK_F32)
        launch_rows<float>(c, a.N, out, on);
    else if (out_dtype == PK_BF16)
        launch_rows<__nv_bfloat16>(c, a.N, out, on);
    else
        launch_rows<__half>(c, a.N, out, on);
    return pk_cuda_check(cudaGetLastError(), what);
}

extern "C" int pk_cuda_dequantize_4bit(const uint8_t *packed, const void *absmax, const float *nested_absmax,
                                       const float *nested_code, const float *offset, const float *table,
                                       int64_t blocksize, int64_t nested_blocksize, int64_t numel, int64_t out_dtype,
                                       void *out, int64_t device, void *stream) {
    const char *what = "dequantize_4bit";
    if (out_dtype != PK_F32 && out_dtype != PK_BF16 && out_dtype != PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "%s: out_dtype must be float32, bfloat16 or float16, got code %d", what,
                       static_cast<int>(out_dtype));
    if (blocksize < 32 || (blocksize & (blocksize - 1)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: blocksize must be a power of two from 32, got %lld", what,
                       static_cast<long long>(blocksize));
    if (numel < 0) return pk_fail(PK_ERR_ARGUMENT, "%s: numel must not be negative", what);
    if (numel == 0) return PK_OK;
    if (!packed || !absmax || !table || !out) return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    const bool nested = nested_code != nullptr;
    if (nested && (!nested_absmax || !offset || nested_blocksize < 1))
        return pk_fail(PK_ERR_ARGUMENT, "%s: nested scales need nested_absmax, offset and nested_blocksize", what);
    if (int code = pk_cuda_use(device, what)) return code;
    if (numel >> 34) return pk_fail(PK_ERR_ARGUMENT, "%s: numel must be below 2^34", what);
    const PkScales scales = pk_scales_of(absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize);
    const PkTable values = pk_table_of(table);
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (out_dtype == PK_F32)
        launch<float>(packed, scales, values, numel, out, device, on);
    else if (out_dtype == PK_BF16)
        launch<__nv_bfloat16>(packed, scales, values, numel, out, device, on);
    else
        launch<__half>(packed, scales, values, numel, out, device, on);
    return pk_cuda_check(cudaGetLastError(), what);
}
