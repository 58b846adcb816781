/* Shared by the CUDA launchers: error texts and the choice of the device. */
#pragma once
#include <stdint.h>
#if defined(PK_SIMT)
#include "../simt/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#endif

#include "../pk_abi.h"

/* Sets pk_last_error() (printf style) and returns `code`. */
int pk_fail(int code, const char *format, ...);

/* PK_OK, or PK_ERR_DEVICE with what the CUDA runtime says about `what`. */
inline int pk_cuda_check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return PK_OK;
    return pk_fail(PK_ERR_DEVICE, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

/* Makes `device` current for the calling thread, as a launch on one of its streams needs. */
inline int pk_cuda_use(int64_t device, const char *what) {
    return pk_cuda_check(cudaSetDevice(static_cast<int>(device)), what);
}

inline bool pk_aligned(const void *p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

/* Launches `kernel` (a function, or a pointer to one) on a grid of blocks (a number, or a dim3) of `threads`
 * threads: by nvcc, or on the host stand-in of csrc/simt. PK_LAUNCH_SHARED adds dynamic shared memory, which the
 * kernel names with PK_DYNAMIC_SHARED(type, name): a `type *`, 16-byte aligned. PK_LAUNCH_AFTER(true, ...): where the
 * GPU can (sm_90 and later), it may begin before the launch before it on the stream has ended, as pk_wait_for_previous
 * in ptx.cuh says (programmatic dependent launch). Errors are left for cudaGetLastError(). */
#if !defined(PK_SIMT) /* csrc/simt/simt.h has its own */
/* More than 48 KB a block have to be asked for. */
template <typename Kernel> inline bool pk_reserve_shared(Kernel *kernel, size_t bytes) {
    return bytes <= (48 << 10) || cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(bytes)) == cudaSuccess;
}
#define PK_LAUNCH_SHARED(kernel, grid, threads, shared_bytes, stream, ...)                                             \
    do {                                                                                                               \
        if (pk_reserve_shared(kernel, shared_bytes)) kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__);     \
    } while (0)
/* `kernel` is machine code for sm_90 or later from PTX of compute_90 or later, in which the waits of ptx.cuh are there,
 * and the driver takes such launches into graphs as well. The kernels of the library are compiled alike: one tells. */
template <typename Kernel> inline bool pk_can_begin_early(Kernel *kernel) {
    static std::atomic<signed char> known[64]; /* of each device: 0: not yet */
    int device = 0, driver = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
    if (!known[device]) {
        cudaFuncAttributes of = {};
        const bool can = cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
                         cudaFuncGetAttributes(&of, kernel) == cudaSuccess && of.ptxVersion >= 90;
        cudaGetLastError(); /* the launch will say it */
        known[device] = can ? 1 : -1;
    }
    return known[device] > 0;
}
template <typename... P, typename... A>
inline void pk_launch_after(bool after, void (*kernel)(P...), dim3 grid, unsigned threads, size_t bytes,
                            cudaStream_t stream, const A &...arguments) {
    if (!pk_reserve_shared(kernel, bytes)) return;
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = &early, config.numAttrs = after && pk_can_begin_early(kernel) ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}
#define PK_LAUNCH_AFTER(after, kernel, grid, threads, shared_bytes, stream, ...)                                       \
    pk_launch_after(after, kernel, grid, threads, shared_bytes, stream, __VA_ARGS__)
/* one array for all kernels of a file: an extern array has one type */
#define PK_DYNAMIC_SHARED(type, name)                                                                                  \
    extern __shared__ __align__(16) unsigned char pk_dynamic_shared[];                                                 \
    type *const name = reinterpret_cast<type *>(pk_dynamic_shared)
#endif
#define PK_LAUNCH(kernel, grid, threads, stream, ...) PK_LAUNCH_SHARED(kernel, grid, threads, 0, stream, __VA_ARGS__)

/* Blocks of a launch. Kernels loop over what a grid of this size does not reach at once. */
inline unsigned pk_grid(int64_t wanted, int64_t most) {
    return static_cast<unsigned>(wanted < 1 ? 1 : (wanted < most ? wanted : most));
}
