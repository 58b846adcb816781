/* Exported functions of rms_norm: argument checks and the cutting into tasks. */
#include "kernels.h"

namespace {
enum { STEP = 8192 }; // elements a task, in whole rows
struct Norm {
    const void *dy, *x, *weight;
    int64_t dtype, w_dtype, rows, n;
    float eps;
    void *out;
    int64_t rows_a_task;
};

void task(void *ctx, int64_t i) {
    const Norm &t = *static_cast<Norm *>(ctx);
    int64_t first = i * t.rows_a_task, end = first + t.rows_a_task < t.rows ? first + t.rows_a_task : t.rows;
    if (t.dy)
        pk_table()->rms_norm_backward_rows(t.dy, t.x, t.weight, t.dtype, t.w_dtype, first, end, t.n, t.eps, t.out);
    else
        pk_table()->rms_norm_rows(t.x, t.weight, t.dtype, t.w_dtype, first, end, t.n, t.eps, t.out);
}

bool bad_float(int64_t dtype) { return dtype < PK_F32 || dtype > PK_F16; }

int run(Norm t, int64_t threads) {
    if (t.rows < 0 || t.n < 1)
        return pk_fail(PK_ERR_ARGUMENT, "rms_norm: rows must not be negative (%lld), n at least 1 (%lld)",
                       (long long)t.rows, (long long)t.n);
    if (bad_float(t.dtype) || bad_float(t.w_dtype))
        return pk_fail(PK_ERR_ARGUMENT,
                       "rms_norm: dtypes must be float32, bfloat16 or float16, got %d and %d for the weight",
                       int(t.dtype), int(t.w_dtype));
    t.rows_a_task = t.n < STEP ? STEP / t.n : 1;
    pk_parallel((t.rows + t.rows_a_task - 1) / t.rows_a_task, threads, task, &t);
    return PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_rms_norm(const void *x, const void *weight, int64_t dtype, int64_t w_dtype, int64_t rows, int64_t n,
                    double eps, void *y, int64_t threads) {
    return run({nullptr, x, weight, dtype, w_dtype, rows, n, float(eps), y, 0}, threads);
}

int pk_cpu_rms_norm_backward(const void *dy, const void *x, const void *weight, int64_t dtype, int64_t w_dtype,
                             int64_t rows, int64_t n, double eps, void *dx, int64_t threads) {
    return run({dy, x, weight, dtype, w_dtype, rows, n, float(eps), dx, 0}, threads);
}
}
