/* The exported function of a softmax by slices: argument checks and the cutting into tasks. */
#include "kernels.h"

namespace {
enum { STEP = 16384 }; // scores a task, in whole rows

struct Work {
    PkSoftmaxSlice t;
    int64_t rows_a_task;
};

void task(void *ctx, int64_t i) {
    const Work &w = *static_cast<Work *>(ctx);
    int64_t first = i * w.rows_a_task, end = first + w.rows_a_task;
    pk_table()->softmax_slice_rows(&w.t, first, end < w.t.rows ? end : w.t.rows);
}
} // namespace

extern "C" int pk_cpu_softmax_slice(const void *scores, int64_t dtype, int64_t rows, int64_t width,
                                    const int64_t *targets, int64_t start, double scale, const float *before, void *p,
                                    float *after, float *rescale, int64_t threads) {
    if (rows < 0 || width < 1 || dtype < PK_F32 || dtype > PK_F16)
        return pk_fail(PK_ERR_ARGUMENT,
                       "softmax_slice: rows must not be negative (%lld), width at least 1 (%lld), dtype float32, "
                       "bfloat16 or float16 (%d)",
                       (long long)rows, (long long)width, int(dtype));
    Work w = {{scores, dtype, rows, width, targets, start, float(scale), before, p, after, rescale},
              width < STEP ? STEP / width : 1};
    pk_parallel((rows + w.rows_a_task - 1) / w.rows_a_task, threads, task, &w);
    return PK_OK;
}
