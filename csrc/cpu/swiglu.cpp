/* Exported functions of swiglu: argument checks and the cutting into tasks. */
#include "kernels.h"

namespace {
enum { STEP = 8192 }; // elements a task, a multiple of every vector length
struct Swiglu {
    const void *dh, *gate, *up;
    int64_t dtype, numel;
    void *dgate, *dup, *h;
};

void forward_task(void *ctx, int64_t task) {
    const Swiglu &t = *static_cast<Swiglu *>(ctx);
    int64_t end = (task + 1) * STEP;
    pk_table()->swiglu_range(t.gate, t.up, t.dtype, task * STEP, end < t.numel ? end : t.numel, t.h);
}

void backward_task(void *ctx, int64_t task) {
    const Swiglu &t = *static_cast<Swiglu *>(ctx);
    int64_t end = (task + 1) * STEP;
    pk_table()->swiglu_backward_range(t.dh, t.gate, t.up, t.dtype, task * STEP, end < t.numel ? end : t.numel, t.dgate,
                                      t.dup);
}

int run(Swiglu &t, int64_t threads, void (*task)(void *, int64_t)) {
    if (t.numel < 0 || t.dtype < PK_F32 || t.dtype > PK_F16)
        return pk_fail(PK_ERR_ARGUMENT,
                       "swiglu: numel must not be negative (%lld), dtype float32, bfloat16 or float16 (%d)",
                       (long long)t.numel, int(t.dtype));
    pk_parallel((t.numel + STEP - 1) / STEP, threads, task, &t);
    return PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_swiglu(const void *gate, const void *up, int64_t dtype, int64_t numel, void *h, int64_t threads) {
    Swiglu t = {nullptr, gate, up, dtype, numel, nullptr, nullptr, h};
    return run(t, threads, forward_task);
}

int pk_cpu_swiglu_backward(const void *dh, const void *gate, const void *up, int64_t dtype, int64_t numel, void *dgate,
                           void *dup, int64_t threads) {
    Swiglu t = {dh, gate, up, dtype, numel, dgate, dup, nullptr};
    return run(t, threads, backward_task);
}
}
