/* Exported dequantize_rows, and the checks of weights in groups (bugs of the caller; an index of groups that was
 * overwritten since it was looked at, too). */
#include <string.h>

#include "../kernels.h"

namespace {
struct Job {
    const pk_lora_args *weight;
    int64_t rows, columns, parts; /* of a task; parts: tasks a row, where it takes several */
    int64_t out_dtype;
    void *out;
};

void run(void *ctx, int64_t task) {
    const Job *j = static_cast<const Job *>(ctx);
    int64_t row = task / j->parts * j->rows, first = task % j->parts * j->columns;
    int64_t rows = j->weight->N - row < j->rows ? j->weight->N - row : j->rows;
    int64_t columns = j->weight->K - first < j->columns ? j->weight->K - first : j->columns;
    pk_table()->dequantize_rows(j->weight, row, rows, first, columns, j->out_dtype, j->out);
}
} // namespace

int pk_groups_check(const pk_lora_args *a) {
    if (a->K % pk_block_columns(a->quant_type))
        return pk_fail(PK_ERR_ARGUMENT, "K must be a multiple of %lld for format %lld, got %lld",
                       (long long)pk_block_columns(a->quant_type), (long long)a->quant_type, (long long)a->K);
    if (!a->weight && a->N > 0 && a->K > 0) return pk_fail(PK_ERR_ARGUMENT, "a quantised weight is NULL");
    if (a->quant_type > PK_UINT8) return PK_OK;
    if (a->blocksize < 1) return pk_fail(PK_ERR_ARGUMENT, "groups must be of 1 column or more");
    if (a->w_dtype < PK_F32 || a->w_dtype > PK_F16 || (!a->absmax && a->N > 0 && a->K > 0) ||
        (a->nested_absmax && a->nested_blocksize != PK_U8 && a->nested_blocksize != a->w_dtype))
        return pk_fail(PK_ERR_ARGUMENT,
                       "integers by group need scales of float32, bfloat16 or float16, and zeros of their dtype or "
                       "uint8, got %lld and %lld",
                       (long long)a->w_dtype, (long long)a->nested_blocksize);
    const int32_t *index = (const int32_t *)a->nested_code;
    uint64_t groups = uint64_t((a->K + a->blocksize - 1) / a->blocksize);
    bool fit = true;
    for (int64_t k = 0; index && k < a->K; ++k) fit &= uint32_t(index[k]) < groups;
    for (int64_t k = 0; !fit && k < a->K; ++k)
        if (uint32_t(index[k]) >= groups)
            return pk_fail(PK_ERR_ARGUMENT, "column %lld is of group %d (g_idx), there are %lld", (long long)k,
                           int(index[k]), (long long)groups);
    return PK_OK;
}

extern "C" int pk_cpu_dequantize_rows(const void *weight, const void *absmax, const void *nested_absmax,
                                      const void *nested_code, const void *offset, int64_t quant_type,
                                      int64_t blocksize, int64_t nested_blocksize, int64_t w_dtype, int64_t N,
                                      int64_t K, int64_t out_dtype, void *out, int64_t threads) {
    if (!pk_in_groups(quant_type) || quant_type > PK_MXFP4 || N < 0 || K < 0 || out_dtype < PK_F32 ||
        out_dtype > PK_F16 || (!out && N > 0 && K > 0))
        return pk_fail(PK_ERR_ARGUMENT, "dequantize_rows: bad arguments (format %lld, N %lld, K %lld, out_dtype %lld)",
                       (long long)quant_type, (long long)N, (long long)K, (long long)out_dtype);
    pk_lora_args args;
    memset(&args, 0, sizeof args);
    args.weight = weight, args.absmax = absmax, args.nested_absmax = (const float *)nested_absmax;
    args.nested_code = (const float *)nested_code, args.offset = (const float *)offset;
    args.quant_type = quant_type, args.blocksize = blocksize, args.nested_blocksize = nested_blocksize;
    args.w_dtype = w_dtype, args.N = N, args.K = K;
    if (int code = pk_groups_check(&args)) return code;
    if (N == 0 || K == 0) return PK_OK;
    const int64_t task = 65536; /* elements; a multiple of every block */
    bool many = K < task;
    Job job = {&args, many ? task / K : 1, many ? K : task, many ? 1 : (K + task - 1) / task, out_dtype, out};
    pk_parallel((N + job.rows - 1) / job.rows * job.parts, threads, run, &job);
    return PK_OK;
}
