/* The functions that every library of pk_abi.h has (its ABI version, its last error); GPUs, and whether this library
 * runs on them. */
#include <stdarg.h>
#include <stdio.h>

#include "common.cuh"
#include "lora_mma_tile.cuh"

static thread_local char last_error[512] = "";

int pk_fail(int code, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(last_error, sizeof last_error, format, list);
    va_end(list);
    return code;
}

extern "C" int pk_abi_version(void) { return PK_ABI_VERSION; }
extern "C" const char *pk_last_error(void) { return last_error; }

extern "C" int pk_cuda_device_count(int64_t *count) {
    int n = 0;
    int code = pk_cuda_check(cudaGetDeviceCount(&n), "cudaGetDeviceCount");
    if (code == PK_OK) *count = n;
    return code;
}

extern "C" int pk_cuda_versions(int64_t *built, int64_t *driver) {
    int runtime = 0, most = 0;
    int code = pk_cuda_check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    if (code == PK_OK) code = pk_cuda_check(cudaDriverGetVersion(&most), "cudaDriverGetVersion");
    if (code == PK_OK) *built = runtime, *driver = most;
    return code;
}

namespace {
/* Compiled for the architectures that all kernels of this library are: it stands for them. */
__global__ void any_kernel(int *out) { *out = 1; }
} // namespace

extern "C" int pk_cuda_loads(int64_t device) {
    int code = pk_cuda_use(device, "cudaSetDevice"), value = 0;
    const auto attribute = [&](cudaDeviceAttr which) {
        if (code == PK_OK)
            code = pk_cuda_check(cudaDeviceGetAttribute(&value, which, static_cast<int>(device)),
                                 "cudaDeviceGetAttribute");
        return value;
    };
    cudaFuncAttributes found;
    if (code == PK_OK) code = pk_cuda_check(cudaFuncGetAttributes(&found, any_kernel), "cudaFuncGetAttributes");
    const int gpu = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    if (code != PK_OK) return cudaGetLastError(), code; /* it is said; the next launch here should not find it */
    /* tiles are chosen by the GPU; what was compiled for little shared memory has none of those for much */
    if (!mma::small_memory(gpu) && mma::small_memory(found.ptxVersion))
        return pk_fail(PK_ERR_DEVICE, "on sm_%d code of compute_%d would run, which lacks its tiles", gpu,
                       found.ptxVersion);
    return PK_OK;
}
