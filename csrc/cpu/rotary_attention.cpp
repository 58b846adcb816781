/* Exported functions of rotary_attention: argument checks. */
#include "kernels.h"

namespace {
bool bad_float(int64_t dtype) { return dtype < PK_F32 || dtype > PK_F16; }

int run(PkAttention a) {
    if (bad_float(a.dtype) || bad_float(a.table_dtype))
        return pk_fail(PK_ERR_ARGUMENT,
                       "rotary_attention: dtypes must be float32, bfloat16 or float16, got %d and %d for the angles",
                       int(a.dtype), int(a.table_dtype));
    if (a.B < 0 || a.T < 0 || a.H < 1 || a.G < 1 || a.H % a.G || a.D < 2 || a.D % 2)
        return pk_fail(PK_ERR_ARGUMENT,
                       "rotary_attention: no %lld x %lld tokens of %lld heads (%lld of keys) of %lld features",
                       (long long)a.B, (long long)a.T, (long long)a.H, (long long)a.G, (long long)a.D);
    if (!a.B || !a.T) return PK_OK;
    if (int code = pk_table()->rotary_attention(&a))
        return pk_fail(code, "rotary_attention: no memory for %lld tokens", (long long)a.T);
    return PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_rotary_attention(const void *q, const void *k, const void *v, const void *cos, const void *sin,
                            const uint8_t *keep, int64_t dtype, int64_t table_dtype, int64_t B, int64_t T, int64_t H,
                            int64_t G, int64_t D, int64_t tables, int64_t masks, double scale, void *y, float *lse,
                            int64_t threads) {
    return run({q, k, v, nullptr, cos, sin, keep, dtype, table_dtype, B, T, H, G, D, tables, masks, float(scale), y,
                nullptr, nullptr, nullptr, lse, threads});
}

int pk_cpu_rotary_attention_backward(const void *dy, const void *q, const void *k, const void *v, const void *cos,
                                     const void *sin, const uint8_t *keep, const float *lse, int64_t dtype,
                                     int64_t table_dtype, int64_t B, int64_t T, int64_t H, int64_t G, int64_t D,
                                     int64_t tables, int64_t masks, double scale, void *dq, void *dk, void *dv,
                                     int64_t threads) {
    return run({q, k, v, dy, cos, sin, keep, dtype, table_dtype, B, T, H, G, D, tables, masks, float(scale), nullptr,
                dq, dk, dv, const_cast<float *>(lse), threads});
}
}
