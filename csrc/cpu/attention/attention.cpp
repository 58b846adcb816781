/* Exported functions of attention: argument checks. */
#include "../kernels.h"

namespace {
bool bad_float(int64_t dtype) { return dtype < PK_F32 || dtype > PK_F16; }
typedef long long Long;

int run(const pk_attention_args &a, PkAttention what) {
    if (bad_float(a.dtype) || (a.cos && bad_float(a.table_dtype)) || (a.bias && bad_float(a.bias_dtype)))
        return pk_fail(PK_ERR_ARGUMENT,
                       "attention: dtypes must be float32, bfloat16 or float16, got %d, %d for the angles, %d for bias",
                       int(a.dtype), int(a.table_dtype), int(a.bias_dtype));
    if (a.B < 0 || a.T < 0 || a.S < 0 || a.H < 1 || a.G < 1 || a.H % a.G || a.D < 2 || a.D % 2 || a.Dv < 2 ||
        a.Dv % 2 || a.window < 0)
        return pk_fail(PK_ERR_ARGUMENT,
                       "attention: no %lld x %lld queries of %lld heads of %lld features, %lld keys of %lld heads, "
                       "values of %lld features, window %lld",
                       Long(a.B), Long(a.T), Long(a.H), Long(a.D), Long(a.S), Long(a.G), Long(a.Dv), Long(a.window));
    if (a.cos && (a.T != a.S || a.R < 0 || a.R > a.D || a.R % 2))
        return pk_fail(PK_ERR_ARGUMENT,
                       "attention: %lld of %lld features of %lld queries and %lld keys cannot be turned", Long(a.R),
                       Long(a.D), Long(a.T), Long(a.S));
    if (!(a.dropout_p >= 0.0 && a.dropout_p < 1.0) || (a.dropout_p > 0.0 && !a.seed))
        return pk_fail(PK_ERR_ARGUMENT, "attention: dropout needs a seed and p in [0, 1), got p %g", a.dropout_p);
    if (!a.B || (!a.T && !(what == PK_ATTENTION_BACKWARD && a.S))) return PK_OK;
    if (int code = pk_table()->attention(&a, what))
        return pk_fail(code, "attention: no memory for %lld queries and %lld keys", Long(a.T), Long(a.S));
    return PK_OK;
}
} // namespace

extern "C" {
int64_t pk_attention_args_size(void) { return int64_t(sizeof(pk_attention_args)); }
int pk_cpu_attention(const pk_attention_args *args) { return run(*args, PK_ATTENTION); }
int pk_cpu_attention_backward(const pk_attention_args *args) { return run(*args, PK_ATTENTION_BACKWARD); }
int pk_cpu_rotary(const pk_attention_args *args) {
    if (!args->cos || !args->sin) return pk_fail(PK_ERR_ARGUMENT, "rotary: no angles");
    return run(*args, PK_ROTARY);
}
}
