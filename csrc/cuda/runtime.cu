/* The functions that every library of pk_abi.h has (its ABI version, its last error), and the number of GPUs. */
#include <stdarg.h>
#include <stdio.h>

#include "common.cuh"

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
