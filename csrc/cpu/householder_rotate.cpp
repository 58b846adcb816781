/* Exported functions of householder_rotate: argument checks and the cutting into tasks. */
#include "kernels.h"

namespace {
enum { ROWS = 32 }; // rows of a task

struct Work {
    const void *x;
    const float *u, *v;
    int64_t dtype, M, d, r;
    void *y;
    float *s;
    int failed;
    const void *dy; // gradients: dv from s and dy, du from t and x
    const float *t;
    float *du, *dv;
    int64_t columns;
};

void rows(void *ctx, int64_t i) {
    Work &w = *static_cast<Work *>(ctx);
    int64_t first = i * ROWS, end = first + ROWS < w.M ? first + ROWS : w.M;
    if (int code = pk_table()->householder_rows(w.x, w.u, w.v, w.dtype, first, end, w.d, w.r, w.y, w.s))
        __atomic_store_n(&w.failed, code, __ATOMIC_RELAXED);
}

void gradient(void *ctx, int64_t i) {
    const Work &w = *static_cast<Work *>(ctx);
    int64_t col = i / 2 * w.columns;
    if (i % 2)
        pk_table()->householder_gradient(w.s, w.dy, w.dtype, w.M, w.d, w.r, col, w.dv);
    else
        pk_table()->householder_gradient(w.t, w.x, w.dtype, w.M, w.d, w.r, col, w.du);
}

int check(const Work &w) {
    if (w.dtype < PK_F32 || w.dtype > PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "householder_rotate: x must be float32, bfloat16 or float16, got %d",
                       int(w.dtype));
    if (w.M < 0 || w.d < 0 || w.r < 0)
        return pk_fail(PK_ERR_ARGUMENT, "householder_rotate: negative sizes %lld, %lld, %lld", (long long)w.M,
                       (long long)w.d, (long long)w.r);
    return PK_OK;
}

int run(Work &w, int64_t threads) {
    w.failed = 0;
    pk_parallel((w.M + ROWS - 1) / ROWS, threads, rows, &w);
    return w.failed ? pk_fail(w.failed, "householder_rotate: out of memory") : PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_householder_rotate(const void *x, const float *u, const float *v, int64_t dtype, int64_t M, int64_t d,
                              int64_t r, void *y, float *s, int64_t threads) {
    Work w = {x, u, v, dtype, M, d, r, y, s, 0, nullptr, nullptr, nullptr, nullptr, 0};
    if (int code = check(w)) return code;
    return run(w, threads);
}

int pk_cpu_householder_rotate_backward(const void *dy, const void *x, const float *u, const float *v, const float *s,
                                       int64_t dtype, int64_t M, int64_t d, int64_t r, void *dx, float *du, float *dv,
                                       int64_t threads) {
    float *t = static_cast<float *>(pk_scratch(0, size_t(M > 0 && r > 0 ? M * r : 1) * 4));
    if (!t) return pk_fail(PK_ERR_MEMORY, "householder_rotate: no memory for %lld rows", (long long)M);
    Work w = {dy, v, u, dtype, M, d, r, dx, t, 0, nullptr, nullptr, nullptr, nullptr, 0}; // dx = dy - (dy v^T) u
    if (int code = check(w)) return code;
    if (int code = run(w, threads)) return code;
    if (du) {
        Work g = {x, nullptr, nullptr, dtype, M, d, r, nullptr, const_cast<float *>(s), 0, dy, t, du, dv, 0};
        g.columns = pk_table()->householder_columns();
        pk_parallel((d + g.columns - 1) / g.columns * 2, threads, gradient, &g);
    }
    pk_scratch_trim();
    return PK_OK;
}
}
