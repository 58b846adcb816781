/* quantize_4bit on the GPU: the float32 operations of csrc/cpu/quantize_4bit.inc, in the same order, so the same bytes.
 *
 * A block of the format belongs to a team of up to 32 neighbouring lanes; each lane takes 8 elements at a time (16
 * bytes of bfloat16, 4 bytes of result), so loads and stores are coalesced. The maximum goes through shuffles; the
 * elements are read again (from L1) for the codes where a team needs more than one pass. The midpoints lie in shared
 * memory in heap order: 16 floats are 16 banks, so the four look-ups of the 32 lanes never conflict. */
#include "divide.cuh"
#include "values.cuh"

namespace {
constexpr int THREADS = 256;
constexpr int BLOCKS = 4; /* that a multiprocessor holds at least: enough, and with more the compiler spills */
constexpr int CHUNK = 8; /* elements a lane takes at a time */

struct Tables {
    float tree[16];     /* [1..15] midpoints in heap order */
    uint8_t order[16];  /* code by rank */
};

template <typename T> __device__ void load(const T *w, int64_t i, int64_t numel, bool fast, float *v) {
    if (fast) {
        pk_load8(w + i, v);
        return;
    }
#pragma unroll
    for (int k = 0; k < CHUNK; ++k) v[k] = i + k < numel ? pk_float(w[i + k]) : 0.0f;
}

template <typename T, int BS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    quantize_kernel(const T *__restrict__ w, int64_t numel, int64_t nblocks, const __grid_constant__ Tables tables,
                    bool aligned, uint8_t *__restrict__ packed, float *__restrict__ absmax) {
    constexpr int TEAM = BS / CHUNK < 32 ? BS / CHUNK : 32;
    constexpr int PASSES = BS / (CHUNK * TEAM);
    __shared__ float tree[16];
    __shared__ int order[16];
    if (threadIdx.x < 16) {
        tree[threadIdx.x] = tables.tree[threadIdx.x];
        order[threadIdx.x] = tables.order[threadIdx.x];
    }
    __syncthreads();
    const int lane = threadIdx.x % TEAM;
    constexpr int TEAMS = THREADS / TEAM;
    /* every lane of a warp makes the same number of rounds, so that all of them meet in the shuffles */
    for (int64_t base = static_cast<int64_t>(blockIdx.x) * TEAMS; base < nblocks;
         base += static_cast<int64_t>(gridDim.x) * TEAMS) {
        const int64_t block = base + threadIdx.x / TEAM;
        const int64_t first = block * BS;
        const bool full = first + BS <= numel;
        float v[CHUNK];
        uint32_t most = 0; /* magnitudes compare as integers; a NaN is the largest */
#pragma unroll 4
        for (int p = 0; p < PASSES; ++p) {
            load(w, first + (p * TEAM + lane) * CHUNK, numel, full && aligned, v);
#pragma unroll
            for (int k = 0; k < CHUNK; ++k) most = max(most, __float_as_uint(v[k]) & 0x7fffffffu);
        }
#pragma unroll
        for (int d = TEAM / 2; d > 0; d /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, d));
        if (block >= nblocks) continue;
        const float top = __uint_as_float(most);
        const float divisor = top < 1e-38f ? 1e-38f : top;
        const float inverse = pk_inverse(divisor);
        if (lane == 0) absmax[block] = full ? top : divisor;
#pragma unroll 4
        for (int p = 0; p < PASSES; ++p) {
            const int64_t i = first + (p * TEAM + lane) * CHUNK;
            if (PASSES > 1) load(w, i, numel, full && aligned, v);
            uint32_t bytes = 0;
#pragma unroll
            for (int k = 0; k < CHUNK; ++k) {
                /* the spare nibble of an odd count holds the code of zero, whatever the divisor */
                const float s = full ? __fmul_rn(v[k], inverse) : (i + k < numel ? pk_divide(v[k], divisor) : 0.0f);
                int node = 1;
#pragma unroll
                for (int level = 0; level < 4; ++level) node = 2 * node + !(s <= tree[node]);
                /* byte k / 2; the even element in its high nibble */
                bytes |= static_cast<uint32_t>(order[node - 16]) << (8 * (k / 2) + 4 * (1 - k % 2));
            }
            if (full && aligned) {
                reinterpret_cast<uint32_t *>(packed)[i / CHUNK] = bytes;
            } else {
                for (int k = 0; k < CHUNK / 2; ++k)
                    if (i + 2 * k < numel) packed[i / 2 + k] = static_cast<uint8_t>(bytes >> (8 * k));
            }
        }
    }
}

template <typename T>
void launch(const void *w, int64_t numel, int64_t blocksize, const Tables &tables, uint8_t *packed, float *absmax,
            cudaStream_t stream) {
    const T *p = static_cast<const T *>(w);
    const int64_t nblocks = (numel + blocksize - 1) / blocksize;
    const int64_t team = blocksize / CHUNK < 32 ? blocksize / CHUNK : 32;
    const unsigned grid = pk_grid((nblocks * team + THREADS - 1) / THREADS, 1 << 20);
    const bool aligned = pk_aligned(w, 16) && pk_aligned(packed, 4);
    switch (blocksize) {
#define PK_CASE(bs)                                                                                                    \
    case bs: {                                                                                                         \
        auto kernel = quantize_kernel<T, bs>;                                                                          \
        PK_LAUNCH(kernel, grid, THREADS, stream, p, numel, nblocks, tables, aligned, packed, absmax);                  \
        break;                                                                                                         \
    }
        PK_CASE(32) PK_CASE(64) PK_CASE(128) PK_CASE(256) PK_CASE(512) PK_CASE(1024) PK_CASE(2048) PK_CASE(4096)
#undef PK_CASE
    }
}

/* One block of threads per block of scales. */
__global__ void __launch_bounds__(THREADS)
    absmax_kernel(const float *__restrict__ absmax, int64_t n, const float *__restrict__ offset, int64_t blocksize,
                  const uint8_t *__restrict__ rounding, uint8_t *__restrict__ codes,
                  float *__restrict__ nested_absmax) {
    __shared__ float partial[THREADS / 32];
    const int64_t nblocks = (n + blocksize - 1) / blocksize;
    const float shift = *offset;
    for (int64_t block = blockIdx.x; block < nblocks; block += gridDim.x) {
        const int64_t first = block * blocksize, end = min(first + blocksize, n);
        float most = 0.0f;
        for (int64_t i = first + threadIdx.x; i < end; i += THREADS)
            most = fmaxf(most, fabsf(__fsub_rn(absmax[i], shift))); /* fmaxf passes over NaN */
#pragma unroll
        for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, d));
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = most;
        __syncthreads();
        most = partial[0];
#pragma unroll
        for (int k = 1; k < THREADS / 32; ++k) most = fmaxf(most, partial[k]);
        if (threadIdx.x == 0) nested_absmax[block] = most;
        const float inverse = pk_inverse(most);
        for (int64_t i = first + threadIdx.x; i < end; i += THREADS) {
            const float v = __fmul_rn(__fsub_rn(absmax[i], shift), inverse);
            int index = 0; /* NaN: 0 / 0, inf / inf */
            if (v == v) {
                const float s = fminf(fmaxf(v, -1.0f), 1.0f);
                index = static_cast<int>(__fadd_rn(__fmul_rn(__fadd_rn(s, 1.0f), 32767.5f), 0.5f));
            }
            codes[i] = rounding[index];
        }
        __syncthreads(); /* partial is written again in the next round */
    }
}
} // namespace

extern "C" int pk_cuda_quantize_4bit(const void *w, int64_t w_dtype, int64_t numel, int64_t blocksize,
                                     const float *midpoints, const uint8_t *order, uint8_t *packed, float *absmax,
                                     int64_t device, void *stream) {
    const char *what = "quantize_4bit";
    if (w_dtype != PK_F32 && w_dtype != PK_BF16 && w_dtype != PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "%s: w_dtype must be float32, bfloat16 or float16, got code %d", what,
                       static_cast<int>(w_dtype));
    if (blocksize < 32 || blocksize > 4096 || (blocksize & (blocksize - 1)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: blocksize must be a power of two from 32 to 4096, got %lld", what,
                       static_cast<long long>(blocksize));
    if (numel < 0) return pk_fail(PK_ERR_ARGUMENT, "%s: numel must not be negative", what);
    if (numel == 0) return PK_OK;
    if (!w || !midpoints || !order || !packed || !absmax)
        return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    Tables tables = {};
    for (int level = 0, node = 1; level < 4; ++level)
        for (int k = 0; k < 1 << level; ++k, ++node) tables.tree[node] = midpoints[(2 * k + 1) * (8 >> level) - 1];
    for (int k = 0; k < 16; ++k) tables.order[k] = order[k];
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (w_dtype == PK_F32)
        launch<float>(w, numel, blocksize, tables, packed, absmax, on);
    else if (w_dtype == PK_BF16)
        launch<__nv_bfloat16>(w, numel, blocksize, tables, packed, absmax, on);
    else
        launch<__half>(w, numel, blocksize, tables, packed, absmax, on);
    return pk_cuda_check(cudaGetLastError(), what);
}

extern "C" int pk_cuda_quantize_absmax(const float *absmax, int64_t nblocks, const float *offset,
                                       int64_t nested_blocksize, const uint8_t *rounding, uint8_t *codes,
                                       float *nested_absmax, int64_t device, void *stream) {
    const char *what = "quantize_absmax";
    if (nested_blocksize < 1)
        return pk_fail(PK_ERR_ARGUMENT, "%s: nested_blocksize must be positive, got %lld", what,
                       static_cast<long long>(nested_blocksize));
    if (nblocks < 0) return pk_fail(PK_ERR_ARGUMENT, "%s: nblocks must not be negative", what);
    if (nblocks == 0) return PK_OK;
    if (!absmax || !offset || !rounding || !codes || !nested_absmax)
        return pk_fail(PK_ERR_ARGUMENT, "%s: a pointer is NULL", what);
    if (int code = pk_cuda_use(device, what)) return code;
    const unsigned grid = pk_grid((nblocks + nested_blocksize - 1) / nested_blocksize, 1 << 20);
    PK_LAUNCH(absmax_kernel, grid, THREADS, static_cast<cudaStream_t>(stream), absmax, nblocks, offset,
              nested_blocksize, rounding, codes, nested_absmax);
    return pk_cuda_check(cudaGetLastError(), what);
}
