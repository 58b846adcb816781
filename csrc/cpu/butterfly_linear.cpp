/* Exported functions of butterfly_linear. Some rows of x are turned at a time, into a workspace from where
 * lora_linear's kernels read them; backward, dx of the product lies there and is turned back. Rows at once are those
 * of lora_linear's own chunks, so W is decoded no more often than without a rotation. */
#include <string.h>

#include "kernels.h"

namespace {
enum { ROWS = 512, ROWS_BACKWARD = 1024, RANGE = 256, PLENTY = 8 };

const char *at(const void *p, int64_t elements, int64_t dtype) {
    return p ? static_cast<const char *>(p) + elements * (dtype == PK_F32 ? 4 : 2) : nullptr;
}
char *at(void *p, int64_t elements, int64_t dtype) {
    return const_cast<char *>(at(static_cast<const void *>(p), elements, dtype));
}

// Rows at once, all chunks alike but for the last
int64_t chunk_of(int64_t M, int64_t most) {
    int64_t chunks = (M + most - 1) / most;
    return chunks ? ((M + chunks - 1) / chunks + 7) / 8 * 8 : 0;
}

// args of the rows from `row` on
pk_lora_args part_of(const pk_lora_args &args, int64_t row, int64_t rows) {
    pk_lora_args part = args;
    int64_t t = args.x_dtype;
    part.M = rows;
    part.y = at(args.y, row * args.N, t), part.h = at(args.h, row * args.N, t), part.dy = at(args.dy, row * args.N, t);
    return part;
}

int check(const pk_lora_args *args, const PkButterfly &t) {
    if (args->r || args->adapters || args->dropout_p > 0)
        return pk_fail(PK_ERR_ARGUMENT, "butterfly_linear: takes no LoRA adapter and no dropout");
    return pk_butterfly_check(t);
}

int no_memory() { return pk_fail(PK_ERR_MEMORY, "butterfly_linear: no memory for the workspace"); }
} // namespace

extern "C" {
int pk_cpu_butterfly_linear(const pk_lora_args *args, const float *blocks, int64_t b, int64_t m, int64_t shared) {
    PkButterfly t = {args->x, nullptr, blocks, nullptr, args->x_dtype, args->M, args->K, b, m, shared, 0};
    int code = check(args, t);
    int64_t step = chunk_of(args->M, ROWS);
    if (!code && !(t.y = pk_scratch(PK_OUTER_SLOT, size_t(step * args->K) * 4))) code = no_memory();
    for (int64_t row = 0; !code && row < args->M; row += step) {
        t.M = args->M - row < step ? args->M - row : step;
        t.x = at(args->x, row * args->K, args->x_dtype);
        code = pk_butterfly(t, RANGE, args->threads);
        pk_lora_args part = part_of(*args, row, t.M);
        part.x = t.y;
        if (!code) code = pk_cpu_lora_linear(&part, 1);
    }
    pk_scratch_trim(PK_OUTER_SLOT, PK_SCRATCH_SLOTS);
    return code;
}

int pk_cpu_butterfly_linear_backward(const pk_lora_args *args, const float *blocks, int64_t b, int64_t m,
                                     int64_t shared, float *dblocks) {
    PkButterfly t = {args->x, nullptr, blocks, nullptr, args->x_dtype, args->M, args->K, b, m, shared, 0};
    if (int code = check(args, t)) return code;
    bool turns = args->dx || dblocks; // else only dgain is wanted
    int64_t step = chunk_of(args->M, ROWS_BACKWARD), K = args->K, N = args->N;
    // one range of rows, unless there are few columns to share among threads
    int64_t range = pk_table()->butterfly_columns(&t) * PLENTY <= K ? (step ? step : 1) : int64_t(RANGE);
    int64_t ranges = (step + range - 1) / range;
    size_t bytes = dblocks ? size_t(ranges * m * K * b) * 4 : 0;
    void *turned = pk_scratch(PK_OUTER_SLOT, turns ? size_t(step * K) * 4 : 4);
    float *sums = static_cast<float *>(pk_scratch(PK_OUTER_SLOT + 1, bytes));
    float *gains = static_cast<float *>(pk_scratch(PK_OUTER_SLOT + 2, size_t(N) * 4));
    int code = turned && sums && gains ? PK_OK : no_memory();
    if (!code) memset(sums, 0, bytes);
    if (!code && args->dgain) memset(args->dgain, 0, size_t(N) * 4);
    for (int64_t row = 0; !code && row < args->M; row += step) {
        t.M = args->M - row < step ? args->M - row : step;
        pk_lora_args part = part_of(*args, row, t.M);
        part.dx = turns ? turned : nullptr;
        if (args->dgain) part.dgain = gains;
        if ((code = pk_cpu_lora_linear_backward(&part, 1))) break;
        for (int64_t n = 0; args->dgain && n < N; ++n) args->dgain[n] += gains[n];
        t.x = at(args->x, row * K, args->x_dtype), t.y = at(args->dx, row * K, args->x_dtype), t.dy = turned;
        if (dblocks) {
            code = pk_butterfly_backward(t, range, sums, args->threads);
        } else if (turns) {
            PkButterfly back = t;
            back.x = turned, back.transposed = 1;
            code = pk_butterfly(back, RANGE, args->threads);
        }
    }
    if (!code && dblocks) pk_butterfly_sums(t, sums, ranges, dblocks, args->threads);
    pk_scratch_trim(PK_OUTER_SLOT, PK_SCRATCH_SLOTS);
    return code;
}
}
