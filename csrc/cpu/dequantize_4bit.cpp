/* Exported dequantize_4bit: argument checks, threads, and the decoding of nested scales. */
#include "kernels.h"

namespace {
struct Job {
    const uint8_t *packed;
    const float *scales;  /* float32 scales, or NULL: nested */
    const uint8_t *codes; /* nested: a code per block */
    const float *nested_absmax, *nested_code;
    float offset;
    const float *table;
    int64_t numel, blocksize, nested_blocksize, out_dtype, out_size;
    char *out;
};

const int64_t TASK = 65536; /* elements a task; a multiple of every blocksize */

void run(void *ctx, int64_t task) {
    const Job *j = static_cast<const Job *>(ctx);
    int64_t first = task * TASK, n = j->numel - first < TASK ? j->numel - first : TASK;
    int64_t block = first / j->blocksize, blocks = (n + j->blocksize - 1) / j->blocksize;
    float decoded[TASK / 32];
    const float *scales = j->scales ? j->scales + block : decoded;
    if (!j->scales)
        for (int64_t i = 0; i < blocks; ++i) {
            float v = j->nested_code[j->codes[block + i]] * j->nested_absmax[(block + i) / j->nested_blocksize];
            decoded[i] = v + j->offset; /* rounded twice, as the format says: no FMA (-ffp-contract=off) */
        }
    pk_table()->dequantize_4bit_range(j->packed + first / 2, scales, j->table, n, j->blocksize, j->out_dtype,
                                      j->out + first * j->out_size);
}
} // namespace

extern "C" int pk_cpu_dequantize_4bit(const uint8_t *packed, const void *absmax, const float *nested_absmax,
                                      const float *nested_code, const float *offset, int64_t quant_type,
                                      int64_t blocksize, int64_t nested_blocksize, int64_t numel, int64_t out_dtype,
                                      void *out, int64_t threads) {
    if (quant_type != PK_NF4 && quant_type != PK_FP4)
        return pk_fail(PK_ERR_ARGUMENT, "dequantize_4bit: quant_type must be NF4 or FP4, got code %d",
                       static_cast<int>(quant_type));
    if (out_dtype != PK_F32 && out_dtype != PK_BF16 && out_dtype != PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "dequantize_4bit: out_dtype must be float32, bfloat16 or float16, got code %d",
                       static_cast<int>(out_dtype));
    if (blocksize < 32 || blocksize > TASK || (blocksize & (blocksize - 1)))
        return pk_fail(PK_ERR_ARGUMENT, "dequantize_4bit: blocksize must be a power of two from 32 to %d, got %lld",
                       static_cast<int>(TASK), static_cast<long long>(blocksize));
    if (numel < 0) return pk_fail(PK_ERR_ARGUMENT, "dequantize_4bit: numel must not be negative");
    if (numel == 0) return PK_OK;
    if (!packed || !absmax || !out) return pk_fail(PK_ERR_ARGUMENT, "dequantize_4bit: a pointer is NULL");
    bool nested = nested_code != nullptr;
    if (nested && (!nested_absmax || !offset || nested_blocksize < 1))
        return pk_fail(PK_ERR_ARGUMENT,
                       "dequantize_4bit: nested scales need nested_absmax, offset and nested_blocksize");
    int64_t size = out_dtype == PK_F32 ? 4 : 2;
    Job job = {packed,
               nested ? nullptr : static_cast<const float *>(absmax),
               nested ? static_cast<const uint8_t *>(absmax) : nullptr,
               nested_absmax,
               nested_code,
               nested ? *offset : 0.0f,
               quant_type == PK_NF4 ? pk_nf4_table : pk_fp4_table,
               numel,
               blocksize,
               nested_blocksize,
               out_dtype,
               size,
               static_cast<char *>(out)};
    pk_parallel((numel + TASK - 1) / TASK, threads, run, &job);
    return PK_OK;
}
