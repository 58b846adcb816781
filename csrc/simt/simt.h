/* A host stand-in for the CUDA that csrc/cuda uses, so that its sources run, slowly, on a machine with no GPU: for
 * tests.
 *
 * The threads of a block are fibres of one OS thread (machine.cpp), which change over at barriers and at what a warp
 * does together; who goes next is drawn from a seed. Blocks run one after the other, so shared memory is static memory,
 * filled with 0xff (NaN) before each. Floating point is the host's IEEE arithmetic, compiled with -ffp-contract=off.
 *
 * Launches run when the next one is queued, in order; one that may begin early (PK_LAUNCH_AFTER, from sm_90 on) runs
 * some blocks up to pk_wait_for_previous before the one before it runs to its end (launches.cpp).
 *
 * A bug ends the launch and leaves an error for cudaGetLastError(), whose text names the kernel, the block, threads and
 * places. Found in every build: barriers and warp operations that not all their threads reach, or reach at different
 * places; shuffles from lanes that take no part; misaligned or misplaced cp.async and ldmatrix; threads of an early
 * launch that return, or let the next one begin, and have not waited. Compiled with
 * -fsanitize=thread and PK_SIMT_RACES (races.cpp): races, reads of shared memory that nobody wrote, cp.async data that
 * nobody waited for, misaligned vectors. With -fsanitize=address: accesses out of bounds.
 *
 * Required of the sources: launches through PK_LAUNCH; __shared__ variables declared in the kernel itself, not in a
 * function that it calls (they are found by their names in the symbol table). */
#pragma once
#include "machine.h"
#include "numbers.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))

/* arguments are copied: the launch may run later */
#define PK_LAUNCH_AFTER(after, kernel, grid, threads, shared_bytes, stream, ...)                                       \
    (static_cast<void>(stream), simt::launch(#kernel, grid, threads, shared_bytes, after, kernel,                      \
                                             [=](auto pk_kernel) { pk_kernel(__VA_ARGS__); }))
#define PK_LAUNCH_SHARED(kernel, grid, threads, shared_bytes, stream, ...)                                             \
    PK_LAUNCH_AFTER(false, kernel, grid, threads, shared_bytes, stream, __VA_ARGS__)
#define PK_DYNAMIC_SHARED(type, name) type *const name = static_cast<type *>(simt::dynamic_shared())

typedef void *cudaStream_t;
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorNoDevice; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *n) { return *n = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *n) { return *n = 0, cudaSuccess; }
struct cudaFuncAttributes {
    int ptxVersion;
};
/* the PTX that the library has for the GPU: CMakeLists.txt */
template <typename Kernel> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *of, Kernel *) {
    const int gpu = 10 * simt::device.major + simt::device.minor;
    return of->ptxVersion = gpu >= 90 ? 90 : gpu >= 86 ? 86 : 80, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = simt::device.processors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = simt::device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = simt::device.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(simt::device.shared); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    simt::flush(), simt::count_launch();
    return memset(to, value, bytes), cudaSuccess;
}
