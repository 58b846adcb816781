/* Shared by the CUDA launchers: error texts and the choice of the device. */
#pragma once
#include <stdint.h>
#if defined(PK_SIMT)
#include "../simt/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
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

/* Launches `kernel` (a function, or a pointer to one): by nvcc, or on the host stand-in of csrc/simt. */
#if defined(PK_SIMT)
#define PK_LAUNCH(kernel, grid, threads, stream, ...)                                                                  \
    (static_cast<void>(stream), simt::launch(grid, threads, [&] { kernel(__VA_ARGS__); }))
#else
#define PK_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

/* Blocks of a launch. Kernels loop over what a grid of this size does not reach at once. */
inline unsigned pk_grid(int64_t wanted, int64_t most) {
    return static_cast<unsigned>(wanted < 1 ? 1 : (wanted < most ? wanted : most));
}
