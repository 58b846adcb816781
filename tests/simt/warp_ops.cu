/* What a warp does together, in kernels small enough to compare with a few lines of Python (tests/test_simt.py). */
#include "cuda/ptx.cuh"

namespace {
/* a [16, 16] row-major, b [8, 16] (n-major) -> d [16, 8] += a b^T by one warp. HOW 0: fragments read where PTX's tables say;
 * 1: by ldmatrix, a x4, b x2; 2: b as two rows of b^T [16, 8] by ldmatrix.trans; 3: a wrong order of a's registers. */
template <bool BF16, int HOW> __global__ void mma_kernel(const uint16_t *a, const uint16_t *b, float *d) {
    __shared__ __align__(16) uint16_t A[16][16], B[8][16], BT[16][8];
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) A[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) B[i / 16][i % 16] = BT[i % 16][i / 16] = b[i];
    __syncwarp();
    uint32_t fa[4], fb[2];
    if (HOW == 0) {
        for (int i = 0; i < 4; ++i) {
            const uint16_t *p = &A[g + i % 2 * 8][2 * t + i / 2 * 8];
            fa[i] = p[0] | static_cast<uint32_t>(p[1]) << 16;
        }
        for (int i = 0; i < 2; ++i) {
            const uint16_t *p = &B[g][2 * t + i * 8];
            fb[i] = p[0] | static_cast<uint32_t>(p[1]) << 16;
        }
    } else {
        pk_ldmatrix_x4(fa, &A[lane % 16][lane / 16 * 8]);
        if (HOW == 2) {
            uint32_t four[4];
            pk_ldmatrix_x4_trans(four, &BT[lane % 16][0]); /* both halves of the lanes give the same rows */
            fb[0] = four[0], fb[1] = four[1];
        } else {
            pk_ldmatrix_x2(fb, &B[lane % 8][lane / 8 % 2 * 8]);
        }
    }
    if (HOW == 3) {
        const uint32_t swap = fa[1];
        fa[1] = fa[2], fa[2] = swap;
    }
    float acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    if (BF16)
        pk_mma_bf16(acc, fa, fb);
    else
        pk_mma_f16(acc, fa, fb);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}

/* out: 10 words a lane */
__global__ void lanes_kernel(const int *in, int *out) {
    const int lane = threadIdx.x % 32, v = in[threadIdx.x];
    int *o = out + 10 * threadIdx.x;
    o[0] = __shfl_sync(0xffffffffu, v, 35);
    o[1] = __shfl_sync(0xffffffffu, v, lane + 1, 8);
    o[2] = __shfl_xor_sync(0xffffffffu, v, 5);
    o[3] = __shfl_up_sync(0xffffffffu, v, 3);
    o[4] = __shfl_down_sync(0xffffffffu, v, 3, 16);
    o[5] = static_cast<int>(__ballot_sync(0xffffffffu, v % 3 == 0));
    o[6] = __any_sync(0xffffffffu, v == 77);
    o[7] = __all_sync(0xffffffffu, v >= 0);
    o[8] = lane < 20 ? static_cast<int>(__ballot_sync(0x000fffffu, v % 2)) : -1;
    o[9] = static_cast<int>(gridDim.x * 10000 + blockIdx.x * 100 + blockDim.x);
}

/* counts: sum, and, or, xor, min, max, number of compare-and-swaps that won */
__global__ void atomics_kernel(const int *in, int *counts) {
    const int v = in[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(counts, v);
    atomicAnd(counts + 1, v);
    atomicOr(counts + 2, v);
    atomicXor(counts + 3, v);
    atomicMin(counts + 4, v);
    atomicMax(counts + 5, v);
    if (atomicCAS(counts + 7, -1, v) == -1) atomicAdd(counts + 6, 1);
}

/* out[((z * Y + y) * X + x) * threads + t] = that index, with all the shared memory that is asked for */
__global__ void grid_kernel(int *out, int words) {
    PK_DYNAMIC_SHARED(int, all);
    for (int i = threadIdx.x; i < words; i += blockDim.x) all[i] = i;
    __syncthreads();
    int sum = 0;
    for (int i = threadIdx.x; i < words; i += blockDim.x) sum += all[words - 1 - i] - all[i];
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int i = static_cast<int>(block * blockDim.x + threadIdx.x);
    out[i] = words ? i + 0 * sum : -1;
}
} // namespace

extern "C" PK_EXPORT int pk_test_mma(int bf16, int how, const void *a, const void *b, float *d) {
    const uint16_t *p = static_cast<const uint16_t *>(a), *q = static_cast<const uint16_t *>(b);
    auto kernel = bf16 ? mma_kernel<true, 0> : mma_kernel<false, 0>;
    if (how == 1) kernel = bf16 ? mma_kernel<true, 1> : mma_kernel<false, 1>;
    if (how == 2) kernel = bf16 ? mma_kernel<true, 2> : mma_kernel<false, 2>;
    if (how == 3) kernel = bf16 ? mma_kernel<true, 3> : mma_kernel<false, 3>;
    PK_LAUNCH(kernel, 1, 32, nullptr, p, q, d);
    return pk_cuda_check(cudaGetLastError(), "mma");
}
extern "C" PK_EXPORT int pk_test_lanes(const int *in, int *out) {
    PK_LAUNCH(lanes_kernel, 1, 96, nullptr, in, out);
    return pk_cuda_check(cudaGetLastError(), "lanes");
}
extern "C" PK_EXPORT int pk_test_atomics(const int *in, int *counts, int blocks, int threads) {
    PK_LAUNCH(atomics_kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), nullptr, in, counts);
    return pk_cuda_check(cudaGetLastError(), "atomics");
}
extern "C" PK_EXPORT int pk_test_grid(unsigned x, unsigned y, unsigned z, unsigned threads, int shared_bytes, int *out) {
    PK_LAUNCH_SHARED(grid_kernel, dim3(x, y, z), threads, static_cast<size_t>(shared_bytes), nullptr, out,
                     shared_bytes / 4);
    return pk_cuda_check(cudaGetLastError(), "grid");
}
/* The conversions of csrc/simt/numbers.h, on the host: float32 -> 16 bits, and back. */
extern "C" PK_EXPORT void pk_test_round(const float *in, uint16_t *half, uint16_t *bfloat, int64_t n) {
    for (int64_t i = 0; i < n; ++i) half[i] = __float2half_rn(in[i]).x, bfloat[i] = __float2bfloat16_rn(in[i]).x;
}
extern "C" PK_EXPORT void pk_test_widen(const uint16_t *in, float *half, float *bfloat, int64_t n) {
    for (int64_t i = 0; i < n; ++i) half[i] = __half2float(__half{in[i]}), bfloat[i] = __bfloat162float(__nv_bfloat16{in[i]});
}
