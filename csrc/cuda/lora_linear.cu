/* lora_linear on the GPU, of one projection or a stack of them: what is exported. Checks the arguments once, projects x
 * onto every A, and chooses by M. */
#include "lora.cuh"
#include "values.cuh"

namespace {
const char *const what = "lora_linear";

bool is_float(int64_t dtype) { return dtype == PK_F32 || dtype == PK_BF16 || dtype == PK_F16; }
} // namespace

int pk_lora_check(const pk_lora_args *a, const char *what) {
    const auto fail = [what](const char *text, int64_t got) {
        return pk_fail(PK_ERR_ARGUMENT, "%s: %s, got %lld", what, text, static_cast<long long>(got));
    };
    if (!a) return pk_fail(PK_ERR_ARGUMENT, "%s: no arguments", what);
    if (a->M < 0 || a->N < 0 || a->K < 0 || a->r < 0)
        return pk_fail(PK_ERR_ARGUMENT, "%s: negative size (M %lld, N %lld, K %lld, r %lld)", what,
                       static_cast<long long>(a->M), static_cast<long long>(a->N), static_cast<long long>(a->K),
                       static_cast<long long>(a->r));
    if (a->N > INT32_MAX || a->K > INT32_MAX) return fail("N and K must be below 2^31", a->N > a->K ? a->N : a->K);
    if (a->x_dtype != PK_BF16 && a->x_dtype != PK_F16) return fail("x_dtype must be bfloat16 or float16", a->x_dtype);
    const bool groups = a->quant_type == PK_INT4;
    if (a->quant_type != PK_NF4 && a->quant_type != PK_FP4 && !groups)
        return fail("the weight must be NF4, FP4 or int4", a->quant_type);
    if (a->blocksize < 32 || a->blocksize > 4096 || !pk_power_of_two(a->blocksize))
        return fail("blocksize must be a power of two from 32 to 4096", a->blocksize);
    if (groups) {
        if (a->K % a->blocksize) return fail("K must be a multiple of blocksize where groups are of columns", a->K);
        if (a->nested_code) return pk_fail(PK_ERR_ARGUMENT, "%s: serves groups of neighbouring columns only", what);
        if (!is_float(a->w_dtype)) return fail("scales must be float32, bfloat16 or float16", a->w_dtype);
        if (a->nested_absmax && a->nested_blocksize != PK_U8 && a->nested_blocksize != a->w_dtype)
            return fail("zeros must be uint8 or of the dtype of scales", a->nested_blocksize);
    }
    if (!groups && a->nested_code && !pk_power_of_two(a->nested_blocksize))
        return fail("nested_blocksize must be a power of two", a->nested_blocksize);
    if (!groups && a->nested_code && (!a->nested_absmax || !a->offset))
        return pk_fail(PK_ERR_ARGUMENT, "%s: nested scales need nested_absmax and offset", what);
    if (a->N > 0 && a->K > 0 && (!a->weight || !a->absmax || (!a->table && !groups)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: weight, absmax or table is NULL", what);
    if (a->r > 0 && (!is_float(a->a_dtype) || !is_float(a->b_dtype)))
        return fail("a and b must be float32, bfloat16 or float16", is_float(a->a_dtype) ? a->b_dtype : a->a_dtype);
    if (a->r > 65535 * 4) return fail("r must be below 2^18", a->r);
    if (a->adapters && a->r != a->max_rank) return fail("r must be max_rank where rows have adapters", a->r);
    if (a->adapters && (a->S < 0 || a->P < 0 || (a->S > 0 && (!a->starts || !a->ranks || !a->scalings))))
        return fail("a stack needs starts, ranks and scalings, and S and P of 0 or more", a->S < a->P ? a->S : a->P);
    if (a->adapters && a->gain) return pk_fail(PK_ERR_ARGUMENT, "%s: serves a gain with one adapter only", what);
    const bool some = a->r > 0 && !(a->adapters && a->P == 0);
    if (some && a->M > 0 && ((!a->a && a->K > 0) || (!a->b && a->N > 0)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: a or b is NULL", what);
    if (a->r > 0 && a->dropout_p != 0.0 && (!a->seed || !(a->dropout_p > 0.0 && a->dropout_p < 1.0)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: dropout needs a seed and p in [0, 1), got p %g", what, a->dropout_p);
    if (a->bias && !is_float(a->bias_dtype)) return fail("bias must be float32, bfloat16 or float16", a->bias_dtype);
    if (a->gain && a->r > 0 && a->dropout_p != 0.0)
        return pk_fail(PK_ERR_ARGUMENT, "%s: serves a gain without dropout only, got p %g", what, a->dropout_p);
    return PK_OK;
}

namespace {
int check_workspace(const pk_lora_args &a, int64_t needed) {
    if (needed > 0 && (!a.workspace || a.workspace_bytes < needed || !pk_aligned(a.workspace, 16)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: needs %lld bytes of workspace, 16-byte aligned; got %lld at %p", what,
                       static_cast<long long>(needed), static_cast<long long>(a.workspace_bytes),
                       static_cast<const void *>(a.workspace));
    return PK_OK;
}

/* Without ranks there is no adapter at all. */
pk_lora_args prepared(const pk_lora_args &args) {
    pk_lora_args a = args;
    if (a.r == 0) a.adapters = nullptr;
    return a;
}

int check_forward(const pk_lora_args &a) {
    if (int code = pk_lora_check(&a, what)) return code;
    if (a.M > PK_MMA_ROWS)
        return pk_fail(PK_ERR_ARGUMENT, "%s: M must be at most %lld, got %lld", what,
                       static_cast<long long>(PK_MMA_ROWS), static_cast<long long>(a.M));
    const char *why = a.M > PK_GEMV_ROWS ? pk_lora_mma_refuses(a) : nullptr;
    return why ? pk_fail(PK_ERR_ARGUMENT, "%s: %s", what, why) : int(PK_OK);
}

/* The start of the sums of y, where rows have adapters of their own: one float each. */
int64_t start_bytes(const pk_lora_args &a) {
    return a.adapters && a.M > PK_GEMV_ROWS ? (a.M * a.N * 4 + 15) / 16 * 16 : 0;
}

/* A whole call. Projections that one kernel serves alike are a stack of a launch, and the others launches of their own:
 * quantised alike, and aligned alike. */
struct Call {
    pk_lora_args args[PK_STACK];
    int count = 0, stacks = 0;
    PkStack stack[PK_STACK];
    PkNeed need[PK_STACK];
    /* bytes: groups of integers, the start of sums, all counters, the parts */
    int64_t groups = 0, counters = 0, workspace = 0;
    bool projects = false;
    const pk_lora_args &first() const { return args[0]; }
};

bool alike(const pk_lora_args &a, const pk_lora_args &b) {
    return a.M <= PK_STACK_ROWS && a.quant_type == b.quant_type && a.blocksize == b.blocksize &&
           !a.nested_code == !b.nested_code && (!a.nested_code || a.nested_blocksize == b.nested_blocksize) &&
           pk_lora_mma_general(a) == pk_lora_mma_general(b);
}

int check_stack(const pk_lora_args *args, int64_t count) {
    if (count < 1 || count > PK_STACK)
        return pk_fail(PK_ERR_ARGUMENT, "%s: serves 1 to %d projections, got %lld", what, PK_STACK,
                       static_cast<long long>(count));
    for (int64_t i = 0; i < count; ++i) {
        const pk_lora_args *const a = args ? args + i : nullptr;
        if (int code = a ? check_forward(*a) : pk_lora_check(a, what)) return code;
        if (a->x != args->x || a->x_dtype != args->x_dtype || a->M != args->M || a->K != args->K)
            return pk_fail(PK_ERR_ARGUMENT, "%s: the projections of a stack share x, x_dtype, M and K; %lld does not",
                           what, static_cast<long long>(i));
        if (a->adapters && count > 1)
            return pk_fail(PK_ERR_ARGUMENT, "%s: rows with adapters of their own take one projection, got %lld", what,
                           static_cast<long long>(count));
    }
    return PK_OK;
}

/* From checked arguments. */
void plan(const pk_lora_args *args, int64_t count, Call &call) {
    for (int i = 0; i < count; ++i) {
        pk_lora_args &a = call.args[call.count++];
        a = prepared(args[i]);
        call.projects |= a.r > 0;
        int k = 0;
        while (k < call.stacks && !alike(*call.stack[k].layer[0], a)) ++k;
        if (k == call.stacks) call.stack[call.stacks++].count = 0;
        call.stack[k].layer[call.stack[k].count++] = &a;
    }
    call.groups = pk_lora_groups_bytes(call.args, call.count, false);
    call.workspace = call.groups + start_bytes(call.first());
    const auto need_of = call.first().M > PK_GEMV_ROWS ? pk_lora_mma_need : pk_lora_gemv_need;
    for (int k = 0; k < call.stacks; ++k) {
        call.need[k] = need_of(call.stack[k]);
        call.counters += call.need[k].counters;
        call.workspace += call.need[k].counters + call.need[k].parts;
    }
    call.projects |= call.counters > 0;
}

int check_backward(const pk_lora_args &a) {
    if (int code = pk_lora_check(&a, what)) return code;
    if (a.M > PK_BACKWARD_ROWS)
        return pk_fail(PK_ERR_ARGUMENT, "%s: M must be at most %lld in the backward, got %lld", what,
                       static_cast<long long>(PK_BACKWARD_ROWS), static_cast<long long>(a.M));
    return PK_OK;
}

int forward(Call &call, cudaStream_t on) {
    const pk_lora_args &first = call.first();
    if (int code = pk_lora_groups(call.args, call.count, first.workspace, false, on)) return code;
    char *const room = reinterpret_cast<char *>(first.workspace) + call.groups;
    float *const start = start_bytes(first) ? reinterpret_cast<float *>(room) : nullptr;
    char *counters = room + start_bytes(first), *parts = counters + call.counters;
    if (call.projects) {
        PkStack all = {{}, call.count};
        for (int i = 0; i < call.count; ++i) all.layer[i] = call.args + i;
        if (int code = pk_lora_project(all, counters, call.counters, on)) return code;
    }
    if (start)
        if (int code = pk_lora_expand(first, first.s, false, start, on)) return code;
    /* scales of groups and indices of adapters may have been written just now: they are read when the launch before
     * has ended */
    const bool after = call.projects && !first.adapters && !call.groups;
    for (int k = 0; k < call.stacks; ++k) {
        const PkRoom own = {reinterpret_cast<unsigned *>(counters), reinterpret_cast<float *>(parts)};
        counters += call.need[k].counters, parts += call.need[k].parts;
        if (int code = first.M > PK_GEMV_ROWS ? pk_lora_mma(call.stack[k], start, own, after, on)
                                              : pk_lora_gemv(call.stack[k], own, after, on))
            return code;
    }
    return pk_cuda_check(cudaGetLastError(), what);
}
} // namespace

extern "C" int pk_cuda_lora_stacked_workspace(const pk_lora_args *args, int64_t count, int64_t *bytes) {
    if (int code = check_stack(args, count)) return code;
    if (!bytes) return pk_fail(PK_ERR_ARGUMENT, "%s: bytes is NULL", what);
    *bytes = 0;
    if (args->M == 0) return PK_OK;
    Call call;
    plan(args, count, call);
    *bytes = call.workspace;
    return PK_OK;
}

extern "C" int pk_cuda_lora_workspace(const pk_lora_args *args, int64_t backward, int64_t *bytes) {
    if (!backward) return pk_cuda_lora_stacked_workspace(args, 1, bytes);
    if (!args) return pk_lora_check(args, what);
    const pk_lora_args a = prepared(*args);
    if (int code = check_backward(a)) return code;
    if (!bytes) return pk_fail(PK_ERR_ARGUMENT, "%s: bytes is NULL", what);
    *bytes = a.M == 0 ? 0 : pk_lora_backward_workspace(a);
    return PK_OK;
}

extern "C" int pk_cuda_lora_linear_stacked(const pk_lora_args *args, int64_t count, int64_t device, void *stream) {
    if (int code = check_stack(args, count)) return code;
    if (args->M == 0) return PK_OK;
    for (int64_t i = 0; i < count; ++i)
        if ((args[i].K > 0 && !args[i].x) || (args[i].N > 0 && !args[i].y) || (args[i].r > 0 && !args[i].s))
            return pk_fail(PK_ERR_ARGUMENT, "%s: x, y or s is NULL", what);
    Call call;
    plan(args, count, call);
    if (int code = check_workspace(call.first(), call.workspace)) return code;
    if (int code = pk_cuda_use(device, what)) return code;
    return forward(call, static_cast<cudaStream_t>(stream));
}

extern "C" int pk_cuda_lora_linear(const pk_lora_args *args, int64_t device, void *stream) {
    return pk_cuda_lora_linear_stacked(args, 1, device, stream);
}

extern "C" int pk_cuda_lora_linear_backward(const pk_lora_args *args, int64_t device, void *stream) {
    if (!args) return pk_lora_check(args, what);
    const pk_lora_args a = prepared(*args);
    if (int code = check_backward(a)) return code;
    const bool factors = (a.da || a.db) && a.r > 0;
    if (a.M > 0 && ((!a.dy && a.N > 0) || (factors && (!a.s || (!a.x && a.K > 0)))))
        return pk_fail(PK_ERR_ARGUMENT, "%s: dy, x or s is NULL", what);
    if (a.r > 0 && a.N > 0 && a.K > 0 && !a.da != !a.db)
        return pk_fail(PK_ERR_ARGUMENT, "%s: da and db are given together or not at all", what);
    if (a.dgain && (!a.gain || (!a.h && a.M > 0 && a.N > 0)))
        return pk_fail(PK_ERR_ARGUMENT, "%s: dgain needs gain and h", what);
    if (int code = check_workspace(a, a.M == 0 ? 0 : pk_lora_backward_workspace(a))) return code;
    if (int code = pk_cuda_use(device, what)) return code;
    return pk_lora_backward(a, static_cast<cudaStream_t>(stream));
}
