/* Exported functions of pair_rotate: argument checks and the cutting into tasks. */
#include <string.h>

#include "kernels.h"

namespace {
enum { ROWS = 16, ROWS_GRADIENT = 256 }; // rows of a task; the sums over rows are cut there

struct Work {
    const void *dy, *x;
    const float *first, *second;
    int64_t dtype, M, d, half;
    void *y;
    bool back;
    float *sums; // [ranges of rows][2][d]
};

void rows(void *ctx, int64_t i) {
    const Work &w = *static_cast<Work *>(ctx);
    int64_t row = i * ROWS, end = row + ROWS < w.M ? row + ROWS : w.M;
    pk_table()->pair_rows(w.back ? w.dy : w.x, w.first, w.second, w.dtype, row, end, w.d, w.half, w.back, w.y);
}

void gradient(void *ctx, int64_t i) {
    const Work &w = *static_cast<Work *>(ctx);
    int64_t row = i * ROWS_GRADIENT, end = row + ROWS_GRADIENT < w.M ? row + ROWS_GRADIENT : w.M;
    float *sums = w.sums + i * 2 * w.d;
    memset(sums, 0, size_t(2 * w.d) * 4);
    pk_table()->pair_gradient(w.dy, w.x, w.dtype, row, end, w.d, w.half, sums, sums + w.d);
}

int check(const Work &w) {
    if (w.dtype < PK_F32 || w.dtype > PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "pair_rotate: x must be float32, bfloat16 or float16, got %d", int(w.dtype));
    if (w.M < 0 || w.d < 0 || w.half < 1 || w.d % (2 * w.half))
        return pk_fail(PK_ERR_ARGUMENT, "pair_rotate: no pairs %lld apart in %lld features", (long long)w.half,
                       (long long)w.d);
    return PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_pair_rotate(const void *x, const float *first, const float *second, int64_t dtype, int64_t M, int64_t d,
                       int64_t half, void *y, int64_t threads) {
    Work w = {nullptr, x, first, second, dtype, M, d, half, y, false, nullptr};
    if (int code = check(w)) return code;
    pk_parallel((M + ROWS - 1) / ROWS, threads, rows, &w);
    return PK_OK;
}

int pk_cpu_pair_rotate_backward(const void *dy, const void *x, const float *first, const float *second, int64_t dtype,
                                int64_t M, int64_t d, int64_t half, void *dx, float *dfirst, float *dsecond,
                                int64_t threads) {
    Work w = {dy, x, first, second, dtype, M, d, half, dx, true, nullptr};
    if (int code = check(w)) return code;
    if (dx) pk_parallel((M + ROWS - 1) / ROWS, threads, rows, &w);
    if (!dfirst) return PK_OK;
    int64_t ranges = (M + ROWS_GRADIENT - 1) / ROWS_GRADIENT;
    w.sums = static_cast<float *>(pk_scratch(0, size_t(ranges > 0 ? ranges * 2 * d : 1) * 4));
    if (!w.sums) return pk_fail(PK_ERR_MEMORY, "pair_rotate: no memory for the sums of %lld rows", (long long)M);
    pk_parallel(ranges, threads, gradient, &w);
    for (int64_t c = 0; c < d; ++c) {
        float f = 0.0f, s = 0.0f;
        for (int64_t i = 0; i < ranges; ++i) f += w.sums[i * 2 * d + c], s += w.sums[i * 2 * d + d + c];
        dfirst[c] = f, dsecond[c] = s;
    }
    return PK_OK;
}
}
