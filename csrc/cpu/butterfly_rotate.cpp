/* Exported functions of butterfly_rotate: argument checks, the cutting into tasks, and the sums of what tasks found. */
#include <string.h>

#include "kernels.h"

namespace {
enum { ROWS = 512, ROWS_BACKWARD = 1024 }; // rows of a task; the sums of the blocks' gradients are cut there
enum { LITTLE = 1 << 18 }; // multiply-adds that one thread has done before another has begun

struct Work {
    PkButterfly t;
    int64_t rows, across, columns; // of a task; tasks beside each other; columns of a task
    float *sums;                   // backward: [ranges of rows][m][D][b][b]
    int64_t room;
    int failed;
};

void task(void *ctx, int64_t i) {
    Work &w = *static_cast<Work *>(ctx);
    int64_t range = i / w.across, row = range * w.rows, end = row + w.rows < w.t.M ? row + w.rows : w.t.M;
    int64_t col = (i % w.across) * w.columns;
    int code = w.sums ? pk_table()->butterfly_backward_rows(&w.t, row, end, col, w.sums + range * w.room)
                      : pk_table()->butterfly_rows(&w.t, row, end, col);
    if (code) __atomic_store_n(&w.failed, code, __ATOMIC_RELAXED);
}

struct Adding {
    const float *sums;
    float *out;
    int64_t ranges, room, each, blocks, shared; // each: elements of a block
};

void add_up(void *ctx, int64_t factor) { // in the order of the rows, then of the blocks
    const Adding &a = *static_cast<Adding *>(ctx);
    float *out = a.out + factor * (a.shared ? 1 : a.blocks) * a.each;
    memset(out, 0, size_t((a.shared ? 1 : a.blocks) * a.each) * 4);
    for (int64_t range = 0; range < a.ranges; ++range) {
        const float *in = a.sums + range * a.room + factor * a.blocks * a.each;
        for (int64_t n = 0; n < a.blocks; ++n)
            for (int64_t e = 0; e < a.each; ++e) out[(a.shared ? 0 : n * a.each) + e] += in[n * a.each + e];
    }
}

int run(Work &w, int64_t threads) {
    w.columns = pk_table()->butterfly_columns(&w.t), w.failed = 0;
    w.across = (w.t.d + w.columns - 1) / w.columns;
    if (w.t.M <= LITTLE / (w.t.d * w.t.b * w.t.m)) threads = 1;
    pk_parallel((w.t.M + w.rows - 1) / w.rows * w.across, threads, task, &w);
    return w.failed ? pk_fail(w.failed, "butterfly_rotate: out of memory") : PK_OK;
}
} // namespace

int pk_butterfly_check(const PkButterfly &t) {
    if (t.dtype < PK_F32 || t.dtype > PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "butterfly_rotate: x must be float32, bfloat16 or float16, got %d",
                       int(t.dtype));
    if (t.M < 0 || t.d < 1 || t.b < 1 || t.m < 1 || t.m > 62 || t.d % t.b)
        return pk_fail(PK_ERR_ARGUMENT, "butterfly_rotate: no %lld factors of blocks of %lld in %lld features",
                       (long long)t.m, (long long)t.b, (long long)t.d);
    if (t.m > 1 && (t.b % 2 || (t.d / t.b) % (int64_t(1) << (t.m - 1))))
        return pk_fail(PK_ERR_ARGUMENT,
                       "butterfly_rotate: %lld factors need blocks of even size, a multiple of %lld of them",
                       (long long)t.m, (long long)1 << (t.m - 1));
    return PK_OK;
}

int pk_butterfly(const PkButterfly &t, int64_t rows, int64_t threads) {
    Work w = {t, rows, 0, 0, nullptr, 0, 0};
    return run(w, threads);
}

int pk_butterfly_backward(const PkButterfly &t, int64_t rows, float *sums, int64_t threads) {
    Work w = {t, rows, 0, 0, sums, t.m * t.d * t.b, 0};
    return run(w, threads);
}

void pk_butterfly_sums(const PkButterfly &t, const float *sums, int64_t ranges, float *dblocks, int64_t threads) {
    Adding a = {sums, dblocks, ranges, t.m * t.d * t.b, t.b * t.b, t.d / t.b, t.shared};
    pk_parallel(t.m, threads, add_up, &a);
}

extern "C" {
int pk_cpu_butterfly_rotate(const void *x, const float *blocks, int64_t dtype, int64_t M, int64_t d, int64_t b,
                            int64_t m, int64_t shared, int64_t transposed, void *y, int64_t threads) {
    PkButterfly t = {x, nullptr, blocks, y, dtype, M, d, b, m, shared, transposed};
    int code = pk_butterfly_check(t);
    return code ? code : pk_butterfly(t, ROWS, threads);
}

int pk_cpu_butterfly_rotate_backward(const void *dy, const void *x, const float *blocks, int64_t dtype, int64_t M,
                                     int64_t d, int64_t b, int64_t m, int64_t shared, int64_t transposed, void *dx,
                                     float *dblocks, int64_t threads) {
    PkButterfly t = {x, dy, blocks, dx, dtype, M, d, b, m, shared, transposed};
    if (int code = pk_butterfly_check(t)) return code;
    int64_t ranges = (M + ROWS_BACKWARD - 1) / ROWS_BACKWARD;
    size_t bytes = size_t(ranges * m * d * b) * 4;
    float *sums = static_cast<float *>(pk_scratch(0, bytes ? bytes : 4));
    if (!sums) return pk_fail(PK_ERR_MEMORY, "butterfly_rotate: no memory for %lld bytes of sums", (long long)bytes);
    memset(sums, 0, bytes);
    if (int code = pk_butterfly_backward(t, ROWS_BACKWARD, sums, threads)) return code;
    pk_butterfly_sums(t, sums, ranges, dblocks, threads);
    pk_scratch_trim();
    return PK_OK;
}
}
