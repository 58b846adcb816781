/* Many small matrices transposed in one call. Nothing is computed, so one text serves every instruction set. */
#include "kernels.h"

namespace {
enum { TILE = 16, STEP = 256, SERIAL = 1 << 15 }; // STEP: rows or columns, whichever are more, of a task

struct Transposes {
    const pk_transpose *list;
    int64_t count;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T> void tile(const pk_transpose &t, int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
    const T *from = static_cast<const T *>(t.from) + row0 * t.ld_from + col0;
    T *to = static_cast<T *>(t.to) + col0 * t.ld_to + row0;
    for (int64_t c = 0; c < cols; ++c)
        for (int64_t r = 0; r < rows; ++r) to[c * t.ld_to + r] = from[r * t.ld_from + c];
}

int64_t steps(const pk_transpose &t) { return ((t.rows > t.cols ? t.rows : t.cols) + STEP - 1) / STEP; }

template <typename T> void task_of(void *ctx, int64_t task) {
    const Transposes &f = *static_cast<Transposes *>(ctx);
    const pk_transpose *t = f.list;
    for (; task >= steps(*t); ++t) task -= steps(*t);
    bool tall = t->rows > t->cols;
    int64_t row = tall ? task * STEP : 0, col = tall ? 0 : task * STEP;
    int64_t row_end = tall ? least(row + STEP, t->rows) : t->rows, col_end = tall ? t->cols : least(col + STEP, t->cols);
    for (int64_t r = row; r < row_end; r += TILE)
        for (int64_t c = col; c < col_end; c += TILE)
            tile<T>(*t, r, least(TILE, row_end - r), c, least(TILE, col_end - c));
}
} // namespace

extern "C" int pk_cpu_transpose(const pk_transpose *list, int64_t count, int64_t item_bytes, int64_t threads) {
    if (count < 0 || (item_bytes != 2 && item_bytes != 4))
        return pk_fail(PK_ERR_ARGUMENT, "transpose: count must not be negative (%lld), items of 2 or 4 bytes (%lld)",
                       (long long)count, (long long)item_bytes);
    Transposes f = {list, count};
    int64_t tasks = 0, items = 0;
    for (int64_t i = 0; i < count; ++i) {
        const pk_transpose &t = list[i];
        if (t.rows < 0 || t.cols < 0 || t.ld_from < t.cols || t.ld_to < t.rows)
            return pk_fail(PK_ERR_ARGUMENT, "transpose: rows of %lld x %lld must not overlap, got them %lld and %lld apart",
                           (long long)t.rows, (long long)t.cols, (long long)t.ld_from, (long long)t.ld_to);
        tasks += steps(t), items += t.rows * t.cols;
    }
    pk_parallel(tasks, items < SERIAL ? 1 : threads, item_bytes == 2 ? task_of<uint16_t> : task_of<uint32_t>, &f);
    return PK_OK;
}
