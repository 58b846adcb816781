/* Shared by the rotations: the choice of x's type, checks of its shape, sums over the warps of a block. */
#pragma once
#include "values.cuh"

/* go(T{}) for the type of a dtype code that pk_rotation_check has passed. */
template <typename Go> void pk_by_dtype(int64_t dtype, Go go) {
    if (dtype == PK_F32)
        go(float{});
    else if (dtype == PK_BF16)
        go(__nv_bfloat16{});
    else
        go(__half{});
}
inline int64_t pk_bytes(int64_t dtype) { return dtype == PK_F32 ? 4 : 2; }

/* PK_OK, or what is wrong with x [M, d]. */
inline int pk_rotation_check(const char *what, int64_t dtype, int64_t M, int64_t d) {
    if (dtype != PK_F32 && dtype != PK_BF16 && dtype != PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "%s: x must be float32, bfloat16 or float16, got code %d", what,
                       static_cast<int>(dtype));
    if (M < 0 || d < 0 || d >= int64_t(1) << 24)
        return pk_fail(PK_ERR_ARGUMENT, "%s: no x of %lld rows and %lld features", what, static_cast<long long>(M),
                       static_cast<long long>(d));
    return PK_OK;
}

inline int64_t pk_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* COUNT numbers of each thread added over the WARPS warps of a block, in the order of the warps: out(i, lane, sum)
 * for each once, by any thread. shared: WARPS * COUNT * 32 floats; all threads come here. */
template <int WARPS, int COUNT, typename Out>
__device__ __forceinline__ void pk_add_warps(const float (&sums)[COUNT], float *shared, Out out) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) shared[(threadIdx.x / 32 * COUNT + i) * 32 + threadIdx.x % 32] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < COUNT * 32; i += WARPS * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += shared[w * COUNT * 32 + i];
        out(i / 32, i % 32, sum);
    }
}
