/* Exported functions of gated: argument checks and the cutting into tasks. */
#include <math.h>

#include "kernels.h"

namespace {
enum { STEP = 8192 }; // elements a task, a multiple of every vector length

void task(void *ctx, int64_t i) {
    const PkGated &t = *static_cast<PkGated *>(ctx);
    int64_t end = (i + 1) * STEP, numel = t.rows * t.n;
    if (end > numel) end = numel;
    if (t.dh)
        pk_table()->gated_backward_range(&t, i * STEP, end);
    else
        pk_table()->gated_range(&t, i * STEP, end);
}

int run(PkGated t, int64_t threads) {
    if (t.rows < 0 || t.n < 0 || t.dtype < PK_F32 || t.dtype > PK_F16)
        return pk_fail(PK_ERR_ARGUMENT,
                       "gated: rows and n must not be negative (%lld, %lld), dtype float32, bfloat16 or float16 (%d)",
                       (long long)t.rows, (long long)t.n, int(t.dtype));
    auto bad = [&](int64_t step) { return step < 1 || step > 2 || (step == 2 && !t.up); };
    if (t.act < PK_SILU || t.act > PK_RELU2 || bad(t.step) || bad(t.grad_step))
        return pk_fail(PK_ERR_ARGUMENT, "gated: act must be a pk_act (%d), a step 1, or 2 with up (%lld, %lld)",
                       int(t.act), (long long)t.step, (long long)t.grad_step);
    if (t.limit == 0.0f) t.limit = INFINITY;
    bool dense = t.step == 1 && t.grad_step == 1 && t.gate_row == t.n && t.grad_row == t.n;
    if (t.up && t.up_row != t.n) dense = false;
    if (dense) t.n *= t.rows, t.rows = 1; // fewer ends of rows
    pk_parallel((t.rows * t.n + STEP - 1) / STEP, threads, task, &t);
    return PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_gated(const void *gate, const void *up, int64_t dtype, int64_t rows, int64_t n, int64_t gate_row,
                 int64_t up_row, int64_t step, int64_t act, double alpha, double limit, double shift, void *h,
                 int64_t threads) {
    return run({nullptr, gate, up, dtype, rows, n, gate_row, up_row, n, step, 1, act, float(alpha), float(limit),
                float(shift), nullptr, nullptr, h},
               threads);
}

int pk_cpu_gated_backward(const void *dh, const void *gate, const void *up, int64_t dtype, int64_t rows, int64_t n,
                          int64_t gate_row, int64_t up_row, int64_t step, int64_t grad_row, int64_t grad_step,
                          int64_t act, double alpha, double limit, double shift, void *dgate, void *dup,
                          int64_t threads) {
    return run({dh, gate, up, dtype, rows, n, gate_row, up_row, grad_row, step, grad_step, act, float(alpha),
                float(limit), float(shift), dgate, dup, nullptr},
               threads);
}
}
