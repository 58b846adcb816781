/* dequantize_4bit on the GPU: bound by the bytes that it writes, so the layout follows the stores. A thread takes 4
 * packed bytes, 8 elements, one aligned 16-byte store of bfloat16 (two of float32); neighbouring threads take
 * neighbouring words. The table lies in shared memory (16 floats in 16 banks: no conflicts). */
#include "common.cuh"

namespace {
constexpr int THREADS = 256;
constexpr int WORDS = 4; /* independent words per thread and round, to have that many loads under way */

struct Table {
    float value[16];
};

struct Scales {
    const float *absmax;  /* float32 scales, or NULL: nested */
    const uint8_t *codes; /* nested: a code per block */
    const float *nested_absmax, *offset;
    int64_t nested_blocksize;
};

__device__ float scale_of(const Scales &s, const float *code, float offset, int64_t block) {
    if (s.absmax) return s.absmax[block];
    /* product and sum rounded apart, as the format says */
    return __fadd_rn(__fmul_rn(code[s.codes[block]], s.nested_absmax[block / s.nested_blocksize]), offset);
}

template <typename T> __device__ T rounded(float v);
template <> __device__ inline float rounded<float>(float v) { return v; }
template <> __device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ inline __half rounded<__half>(float v) { return __float2half_rn(v); }

__device__ void store8(float *to, const float *v) {
    reinterpret_cast<float4 *>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4 *>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T> __device__ void store8(T *to, const float *v) { /* the 16-bit types */
    union {
        T half[8];
        uint4 words;
    } out;
#pragma unroll
    for (int k = 0; k < 8; ++k) out.half[k] = rounded<T>(v[k]);
    *reinterpret_cast<uint4 *>(to) = out.words;
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    dequantize_kernel(const uint8_t *__restrict__ packed, Scales scales, const float *__restrict__ nested_code,
                      const __grid_constant__ Table entries, int64_t numel, int shift, bool aligned, T *__restrict__ out) {
    __shared__ float table[16], code[256];
    if (threadIdx.x < 16) table[threadIdx.x] = entries.value[threadIdx.x];
    float offset = 0.0f;
    if (!scales.absmax) {
        code[threadIdx.x] = nested_code[threadIdx.x];
        offset = *scales.offset;
    }
    __syncthreads();
    const int64_t words = numel / 8; /* whole words; the rest is done below */
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS * WORDS;
    for (int64_t base = static_cast<int64_t>(blockIdx.x) * THREADS * WORDS + threadIdx.x; base < words; base += stride) {
        uint32_t raw[WORDS];
        float scale[WORDS];
#pragma unroll
        for (int u = 0; u < WORDS; ++u) {
            const int64_t word = base + u * THREADS;
            raw[u] = 0, scale[u] = 0.0f;
            if (word >= words) continue;
            if (aligned) {
                raw[u] = reinterpret_cast<const uint32_t *>(packed)[word];
            } else {
                for (int k = 0; k < 4; ++k) raw[u] |= static_cast<uint32_t>(packed[4 * word + k]) << (8 * k);
            }
            scale[u] = scale_of(scales, code, offset, (8 * word) >> shift); /* a block holds whole words */
        }
#pragma unroll
        for (int u = 0; u < WORDS; ++u) {
            const int64_t word = base + u * THREADS;
            if (word >= words) continue;
            float v[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) /* byte k / 2, the even element in its high nibble */
                v[k] = __fmul_rn(table[(raw[u] >> (8 * (k / 2) + 4 * (1 - k % 2))) & 15u], scale[u]);
            if (aligned) {
                store8(out + 8 * word, v);
            } else {
                for (int k = 0; k < 8; ++k) out[8 * word + k] = rounded<T>(v[k]);
            }
        }
    }
    const int64_t i = 8 * words + threadIdx.x;
    if (blockIdx.x == 0 && i < numel) {
        const unsigned nibble = (packed[i / 2] >> (i % 2 ? 0 : 4)) & 15u;
        out[i] = rounded<T>(__fmul_rn(table[nibble], scale_of(scales, code, offset, i >> shift)));
    }
}

template <typename T>
void launch(const uint8_t *packed, const Scales &scales, const float *nested_code, const Table &table, int64_t numel,
            int64_t blocksize, void *out, cudaStream_t stream) {
    int shift = 0;
    while ((int64_t(1) << shift) < blocksize) ++shift;
    const int64_t per_block = int64_t(THREADS) * WORDS * 8;
    const unsigned grid = pk_grid((numel + per_block - 1) / per_block, 1 << 20);
    const bool aligned = pk_aligned(packed, 4) && pk_aligned(out, 16);
    auto kernel = dequantize_kernel<T>;
    PK_LAUNCH(kernel, grid, THREADS, stream, packed, scales, nested_code, table, numel, shift, aligned,
              static_cast<T *>(out));
}
} // namespace

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
    const Scales scales = {nested ? nullptr : static_cast<const float *>(absmax),
                           nested ? static_cast<const uint8_t *>(absmax) : nullptr, nested_absmax, offset,
                           nested_blocksize};
    Table entries;
    for (int k = 0; k < 16; ++k) entries.value[k] = table[k];
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (out_dtype == PK_F32)
        launch<float>(packed, scales, nested_code, entries, numel, blocksize, out, on);
    else if (out_dtype == PK_BF16)
        launch<__nv_bfloat16>(packed, scales, nested_code, entries, numel, blocksize, out, on);
    else
        launch<__half>(packed, scales, nested_code, entries, numel, blocksize, out, on);
    return pk_cuda_check(cudaGetLastError(), what);
}
