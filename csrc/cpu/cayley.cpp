/* Exported functions of cayley: argument checks; a block is a task. */
#include "kernels.h"

namespace {
struct Work {
    const float *q, *r, *dr;
    int64_t b;
    const float *weights;
    int64_t n;
    float *out;
    int failed;
};

void task(void *ctx, int64_t i) {
    Work &w = *static_cast<Work *>(ctx);
    int64_t at = i * w.b * w.b;
    int code = w.dr ? pk_table()->cayley_backward_block(w.q + at, w.r + at, w.dr + at, w.b, w.weights, w.n, w.out + at)
                    : pk_table()->cayley_block(w.q + at, w.b, w.weights, w.n, w.out + at);
    if (code) __atomic_store_n(&w.failed, code, __ATOMIC_RELAXED);
}

int run(Work w, int64_t blocks, int64_t threads) {
    if (blocks < 0 || w.b < 0 || w.n < 0 || w.n > 128)
        return pk_fail(PK_ERR_ARGUMENT, "cayley: %lld blocks of %lld with %lld terms", (long long)blocks,
                       (long long)w.b, (long long)w.n);
    pk_parallel(blocks, threads, task, &w);
    return w.failed ? pk_fail(w.failed, "cayley: out of memory") : PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_cayley(const float *q, int64_t blocks, int64_t b, const float *weights, int64_t n, float *r,
                  int64_t threads) {
    return run({q, nullptr, nullptr, b, weights, n, r, 0}, blocks, threads);
}

int pk_cpu_cayley_backward(const float *q, const float *r, const float *dr, int64_t blocks, int64_t b,
                           const float *weights, int64_t n, float *dq, int64_t threads) {
    return run({q, r, dr, b, weights, n, dq, 0}, blocks, threads);
}
}
