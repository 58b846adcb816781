/* Exported quantize_4bit: argument checks, threads, and the quantisation of the scales themselves. */
#include <string.h>

#include "kernels.h"

namespace {
struct Job {
    const void *w;
    int64_t w_dtype, numel, blocksize, step;
    const float *tree;
    const uint8_t *order;
    uint8_t *packed;
    float *absmax;
};

void run(void *ctx, int64_t task) {
    const Job *j = static_cast<const Job *>(ctx);
    int64_t first = task * j->step, end = first + j->step < j->numel ? first + j->step : j->numel;
    pk_table()->quantize_4bit_range(j->w, j->w_dtype, first, end, j->blocksize, j->tree, j->order, j->packed,
                                    j->absmax);
}

struct ScaleJob {
    const float *absmax;
    int64_t n, blocksize;
    float offset;
    const uint8_t *rounding;
    uint8_t *codes;
    float *nested_absmax;
};

/* One block of scales. Scalar: a 64th of the elements, and dominated by the table of 64 KiB. */
void run_scales(void *ctx, int64_t block) {
    const ScaleJob *j = static_cast<const ScaleJob *>(ctx);
    int64_t first = block * j->blocksize, end = first + j->blocksize < j->n ? first + j->blocksize : j->n;
    float most = 0.0f;
    for (int64_t i = first; i < end; ++i) {
        float v = j->absmax[i] - j->offset;
        float magnitude = v < 0.0f ? -v : v;
        if (magnitude > most) most = magnitude; /* false for NaN: it is passed over */
    }
    j->nested_absmax[block] = most;
    float inverse = 1.0f / most;
    for (int64_t i = first; i < end; ++i) {
        float v = (j->absmax[i] - j->offset) * inverse;
        int index = 0;
        if (v == v) { /* 0 / 0 and inf / inf are code 0 */
            v = v < -1.0f ? -1.0f : (v > 1.0f ? 1.0f : v);
            index = static_cast<int>((v + 1.0f) * 32767.5f + 0.5f);
        }
        j->codes[i] = j->rounding[index];
    }
}
} // namespace

extern "C" int pk_cpu_quantize_4bit(const void *w, int64_t w_dtype, int64_t numel, int64_t blocksize,
                                    const float *midpoints, const uint8_t *order, uint8_t *packed, float *absmax,
                                    int64_t threads) {
    if (w_dtype != PK_F32 && w_dtype != PK_BF16 && w_dtype != PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "quantize_4bit: w_dtype must be float32, bfloat16 or float16, got code %d",
                       static_cast<int>(w_dtype));
    if (blocksize < 32 || (blocksize & (blocksize - 1)))
        return pk_fail(PK_ERR_ARGUMENT, "quantize_4bit: blocksize must be a power of two from 32, got %lld",
                       static_cast<long long>(blocksize));
    if (numel < 0) return pk_fail(PK_ERR_ARGUMENT, "quantize_4bit: numel must not be negative");
    if (numel == 0) return PK_OK;
    if (!w || !midpoints || !order || !packed || !absmax)
        return pk_fail(PK_ERR_ARGUMENT, "quantize_4bit: a pointer is NULL");
    float tree[16] = {0};
    for (int level = 0, node = 1; level < 4; ++level)
        for (int k = 0; k < 1 << level; ++k, ++node) tree[node] = midpoints[(2 * k + 1) * (8 >> level) - 1];
    int64_t step = blocksize > 65536 ? blocksize : 65536; /* elements a task; a multiple of the blocksize */
    Job job = {w, w_dtype, numel, blocksize, step, tree, order, packed, absmax};
    pk_parallel((numel + step - 1) / step, threads, run, &job);
    return PK_OK;
}

extern "C" int pk_cpu_quantize_absmax(const float *absmax, int64_t nblocks, const float *offset,
                                      int64_t nested_blocksize, const uint8_t *rounding, uint8_t *codes,
                                      float *nested_absmax, int64_t threads) {
    if (nested_blocksize < 1)
        return pk_fail(PK_ERR_ARGUMENT, "quantize_absmax: nested_blocksize must be positive, got %lld",
                       static_cast<long long>(nested_blocksize));
    if (nblocks < 0) return pk_fail(PK_ERR_ARGUMENT, "quantize_absmax: nblocks must not be negative");
    if (nblocks == 0) return PK_OK;
    if (!absmax || !offset || !rounding || !codes || !nested_absmax)
        return pk_fail(PK_ERR_ARGUMENT, "quantize_absmax: a pointer is NULL");
    ScaleJob job = {absmax, nblocks, nested_blocksize, *offset, rounding, codes, nested_absmax};
    int64_t tasks = (nblocks + nested_blocksize - 1) / nested_blocksize;
    pk_parallel(tasks, tasks < 16 ? 1 : threads, run_scales, &job);
    return PK_OK;
}
