/* Exported functions of the norms: argument checks and the cutting into tasks. */
#include <string.h>

#include "kernels.h"

namespace {
enum { STEP = 8192, MOST_PARTS = 32 }; // elements a task, in whole rows; tasks where each has sums of its own

struct Work {
    PkNorm t;
    int64_t rows_a_task, width; // of the sums of a task
    float *sums, *dweight, *dbias;
    int64_t parts;
};

void rows(void *ctx, int64_t i) {
    const Work &w = *static_cast<Work *>(ctx);
    int64_t first = i * w.rows_a_task, end = first + w.rows_a_task < w.t.rows ? first + w.rows_a_task : w.t.rows;
    float *sums = w.sums ? w.sums + i * w.width : nullptr;
    if (sums) memset(sums, 0, size_t(w.width) * sizeof(float));
    pk_table()->norm_rows(&w.t, first, end, sums);
}

// The sums of the tasks, in their order; columns are cut for the threads.
void columns(void *ctx, int64_t i) {
    const Work &w = *static_cast<Work *>(ctx);
    int64_t n = w.t.n, first = i * 512, end = first + 512 < n ? first + 512 : n;
    if (w.dweight) pk_table()->norm_sums(w.sums, w.parts, w.width, first, end, w.dweight);
    if (w.dbias) pk_table()->norm_sums(w.sums + n, w.parts, w.width, first, end, w.dbias);
}

bool bad_float(int64_t dtype) { return dtype < PK_F32 || dtype > PK_F16; }

int run(PkNorm t, float *dweight, float *dbias, int64_t threads) {
    if (t.rows < 0 || t.n < 1 || t.inner < 1)
        return pk_fail(PK_ERR_ARGUMENT, "norm: rows must not be negative (%lld), n and inner at least 1 (%lld, %lld)",
                       (long long)t.rows, (long long)t.n, (long long)t.inner);
    if (bad_float(t.dtype) || bad_float(t.w_dtype))
        return pk_fail(PK_ERR_ARGUMENT,
                       "norm: dtypes must be float32, bfloat16 or float16, got %d and %d for the weight", int(t.dtype),
                       int(t.w_dtype));
    if (!t.centred && (t.bias || dbias)) return pk_fail(PK_ERR_ARGUMENT, "norm: only what is centred has a bias");
    Work w = {t, t.n < STEP ? STEP / t.n : 1, 0, nullptr, dweight, dbias, 0};
    if (dweight || dbias) {
        int64_t least = (t.rows + MOST_PARTS - 1) / MOST_PARTS;
        if (w.rows_a_task < least) w.rows_a_task = least;
        w.width = t.centred ? 2 * t.n : t.n;
    }
    w.parts = (t.rows + w.rows_a_task - 1) / w.rows_a_task;
    if (w.width && !(w.sums = static_cast<float *>(pk_scratch(0, size_t(w.parts * w.width) * sizeof(float) + 1))))
        return pk_fail(PK_ERR_MEMORY, "norm: out of memory");
    pk_parallel(w.parts, threads, rows, &w);
    if (w.width) pk_parallel((t.n + 511) / 512, threads, columns, &w);
    return PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_norm(const void *x, const void *weight, const void *bias, int64_t dtype, int64_t w_dtype, int64_t rows,
                int64_t n, int64_t inner, int64_t inner_row, int64_t outer_row, int64_t centred, double eps,
                double offset, void *y, int64_t threads) {
    return run({nullptr, x, weight, bias, dtype, w_dtype, rows, n, inner, inner_row, outer_row, float(eps),
                float(offset), centred != 0, y},
               nullptr, nullptr, threads);
}

int pk_cpu_norm_backward(const void *dy, const void *x, const void *weight, int64_t dtype, int64_t w_dtype,
                         int64_t rows, int64_t n, int64_t inner, int64_t inner_row, int64_t outer_row, int64_t centred,
                         double eps, double offset, void *dx, float *dweight, float *dbias, int64_t threads) {
    return run({dy, x, weight, nullptr, dtype, w_dtype, rows, n, inner, inner_row, outer_row, float(eps),
                float(offset), centred != 0, dx},
               dweight, dbias, threads);
}
}
