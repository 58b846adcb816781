/* Exported functions of the LoRA family: argument checks (bugs of the caller; users' mistakes are found in Python). */
#include <float.h>
#include <math.h>

#include "../kernels.h"

/* Refuses adapters in use that share rows of a stack: such rows would get the gradient of one of them only. */
static int check_disjoint(const pk_lora_args *a) {
    int64_t *owner = (int64_t *)pk_scratch(0, size_t(a->P) * 8);
    if (!owner) return pk_fail(PK_ERR_MEMORY, "lora_linear: no memory for the owners of %lld rows", (long long)a->P);
    for (int64_t j = 0; j < a->P; ++j) owner[j] = -1;
    for (int64_t m = 0; m < a->M; ++m) {
        int64_t i = a->adapters[m];
        if (i < 0 || !a->ranks[i] || owner[a->starts[i]] == i) continue;
        for (int64_t j = a->starts[i]; j < a->starts[i] + a->ranks[i]; ++j) {
            if (owner[j] >= 0)
                return pk_fail(PK_ERR_ARGUMENT, "lora_linear: adapters %lld and %lld share row %lld of a and b",
                               (long long)owner[j], (long long)i, (long long)j);
            owner[j] = i;
        }
    }
    return PK_OK;
}

static int check_adapters(const pk_lora_args *a, bool backward) {
    if (a->gain) return pk_fail(PK_ERR_ARGUMENT, "lora_linear: an adapter per row and a gain do not go together");
    bool by_pointer = pk_adapters_by_pointer(a);
    if (a->S < 0 || a->P < 0 || a->r != a->max_rank || a->M > INT32_MAX)
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: bad sizes (S %lld, P %lld, r %lld, max_rank %lld, M %lld)",
                       (long long)a->S, (long long)a->P, (long long)a->r, (long long)a->max_rank, (long long)a->M);
    for (int64_t m = 0; m < a->M; ++m) {
        int64_t i = a->adapters[m];
        if (i < -1 || i >= a->S)
            return pk_fail(PK_ERR_ARGUMENT, "lora_linear: adapter %lld of row %lld of x, there are %lld", (long long)i,
                           (long long)m, (long long)a->S);
        if (i < 0) continue;
        int64_t rank = a->ranks[i], start = by_pointer ? 0 : a->starts[i];
        if (rank > 0 && by_pointer &&
            ((a->K > 0 && !((const void *const *)a->a)[i]) || (a->N > 0 && !((const void *const *)a->b)[i])))
            return pk_fail(PK_ERR_ARGUMENT, "lora_linear: adapter %lld of row %lld of x has no a or no b", (long long)i,
                           (long long)m);
        if (rank < 0 || rank > a->max_rank || (rank > 0 && !by_pointer && (start < 0 || start > a->P - rank)))
            return pk_fail(PK_ERR_ARGUMENT,
                           "lora_linear: adapter %lld has rank %lld (max_rank %lld) from row %lld of %lld",
                           (long long)i, (long long)rank, (long long)a->max_rank, (long long)start, (long long)a->P);
    }
    return backward && pk_wants_factors(a) && !by_pointer ? check_disjoint(a) : PK_OK;
}

int pk_lora_check(const pk_lora_args *a, bool backward) {
    if (a->M < 0 || a->N < 0 || a->K < 0 || a->r < 0)
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: negative size (M %lld, N %lld, K %lld, r %lld)", (long long)a->M,
                       (long long)a->N, (long long)a->K, (long long)a->r);
    if (a->x_dtype < PK_F32 || a->x_dtype > PK_F16)
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: x_dtype must be float32, bfloat16 or float16, got %d",
                       int(a->x_dtype));
    if (a->quant_type < PK_DENSE || a->quant_type > PK_MXFP4)
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: unknown quant_type %d", int(a->quant_type));
    if (a->quant_type == PK_DENSE && (a->w_dtype < PK_F32 || a->w_dtype > PK_F16))
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: unsupported dtype of a dense weight, %d", int(a->w_dtype));
    bool in_groups = pk_in_groups(a->quant_type);
    if (in_groups)
        if (int code = pk_groups_check(a)) return code;
    if (a->quant_type != PK_DENSE && !in_groups &&
        (a->blocksize <= 0 || (a->nested_code && a->nested_blocksize <= 0)))
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: blocksizes must be positive");
    if (a->quant_type != PK_DENSE && !in_groups && a->nested_code && (!a->nested_absmax || !a->offset))
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: nested scales need nested_absmax and offset");
    bool empty = a->adapters && !pk_adapters_by_pointer(a) && !a->P;
    if (a->r > 0 && ((!a->a && a->K > 0 && !empty) || (!a->b && a->N > 0 && !empty) || a->a_dtype > PK_F16 ||
                     a->b_dtype > PK_F16 || (!a->s && a->M > 0)))
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: an adapter needs a, b (float32, bfloat16 or float16) and s");
    if (a->r > 0 && a->dropout_p > 0 && (!a->seed || !(a->dropout_p < 1)))
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: dropout needs a seed and p < 1");
    if (!backward && a->h && !a->gain) return pk_fail(PK_ERR_ARGUMENT, "lora_linear: h is given without a gain");
    if (backward && a->dgain && (!a->gain || (!a->h && a->M > 0 && a->N > 0)))
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: dgain needs gain and h");
    if (!backward && a->bias && (a->bias_dtype < PK_F32 || a->bias_dtype > PK_F16))
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: unsupported dtype of bias, %d", int(a->bias_dtype));
    return a->adapters ? check_adapters(a, backward) : PK_OK;
}

static int check_stack(const pk_lora_args *args, int64_t count, bool backward) {
    if (count < 1 || count > PK_LORA_MOST)
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear: 1 to %d projections, got %lld", int(PK_LORA_MOST),
                       (long long)count);
    for (int64_t i = 0; i < count; ++i) {
        const pk_lora_args &a = args[i];
        if (a.x != args->x || a.dx != args->dx || a.M != args->M || a.K != args->K || a.x_dtype != args->x_dtype)
            return pk_fail(PK_ERR_ARGUMENT, "lora_linear: projections of a stack share x and dx, number %lld does not",
                           (long long)i);
        int code = pk_lora_check(args + i, backward);
        if (code) return code;
    }
    return PK_OK;
}

static int check_mixture(const pk_lora_args *args, const float *mix, int64_t n, bool backward) {
    if (args->gain || args->adapters || n < 1 || args->r % n || (!mix && args->M > 0))
        return pk_fail(PK_ERR_ARGUMENT, "lora_mixture: no gain, no adapters per row, and weights of n adapters of as "
                       "many ranks each, got n %lld of rank %lld in all", (long long)n, (long long)args->r);
    return pk_lora_check(args, backward);
}

static int finish(int code) {
    return code == PK_ERR_MEMORY ? pk_fail(code, "lora_linear: no memory for the workspace") : code;
}

extern "C" {
int64_t pk_lora_args_size(void) { return int64_t(sizeof(pk_lora_args)); }

int pk_cpu_lora_linear(const pk_lora_args *args, int64_t count) {
    int code = check_stack(args, count, false);
    if (code || args->M == 0) return code;
    return finish(pk_table()->lora_linear(args, count));
}

int pk_cpu_lora_linear_paths(const pk_lora_args *args, int64_t count, int64_t row, int64_t *paths) {
    if (int code = check_stack(args, count, false)) return code;
    if (row < 0 || row >= args->M)
        return pk_fail(PK_ERR_ARGUMENT, "lora_linear_paths: row must be one of the %lld of x, got %lld",
                       (long long)args->M, (long long)row);
    pk_table()->lora_linear_paths(args, count, row, paths);
    return PK_OK;
}

int pk_cpu_lora_linear_backward(const pk_lora_args *args, int64_t count) {
    int code = check_stack(args, count, true);
    return code ? code : finish(pk_table()->lora_linear_backward(args, count));
}

int pk_cpu_lora_mixture(const pk_lora_args *args, const float *mix, int64_t n, int64_t masked) {
    int code = check_mixture(args, mix, n, false);
    PkMixture given = {mix, n, masked != 0, nullptr};
    return code || args->M == 0 ? code : finish(pk_table()->lora_mixture(args, &given));
}

int pk_cpu_lora_mixture_backward(const pk_lora_args *args, const float *mix, int64_t n, int64_t masked, float *dmix) {
    int code = check_mixture(args, mix, n, true);
    PkMixture given = {mix, n, masked != 0, dmix};
    return code ? code : finish(pk_table()->lora_mixture_backward(args, &given));
}

int pk_cpu_squared_row_norms(const pk_lora_args *args, double *squares) {
    pk_lora_args weight = *args; // without what belongs to rows of x
    weight.M = 0, weight.x_dtype = PK_F32, weight.gain = nullptr, weight.h = nullptr, weight.dgain = nullptr;
    weight.dropout_p = 0;
    int code = pk_lora_check(&weight, true);
    return code ? code : finish(pk_table()->squared_row_norms(&weight, squares));
}

int pk_cpu_dora_linear(const pk_lora_args *args, const float *magnitude, float *gain, float *norm) {
    if (args->gain != gain || (args->N > 0 && (!gain || !magnitude || !norm)))
        return pk_fail(PK_ERR_ARGUMENT, "dora_linear: needs magnitude, norm, and a gain that is the arguments' own");
    int code = pk_lora_check(args, false);
    if (code) return code;
    double *squares = (double *)pk_scratch(2, size_t(args->N) * 8);
    if (!squares) return finish(PK_ERR_MEMORY);
    if ((code = pk_cpu_squared_row_norms(args, squares))) return code;
    for (int64_t i = 0; i < args->N; ++i) {
        float length = float(sqrt(squares[i]));
        norm[i] = length < FLT_MIN ? FLT_MIN : length; // NaN stays
        gain[i] = magnitude[i] / norm[i];
    }
    return pk_cpu_lora_linear(args, 1);
}

int pk_cpu_dora_linear_backward(const pk_lora_args *args, const float *norm) {
    if (args->dgain && args->N > 0 && !norm)
        return pk_fail(PK_ERR_ARGUMENT, "dora_linear: the gradient of magnitude needs norm");
    int code = pk_cpu_lora_linear_backward(args, 1);
    if (code || !args->dgain) return code;
    for (int64_t i = 0; i < args->N; ++i) args->dgain[i] /= norm[i];
    return PK_OK;
}
}
