/* grouped_linear: lora_linear of each group of rows, whose kernels are called here; nothing is multiplied in this file.
 *
 * Groups are independent, so each is a task of its own. A group that has more than a thread's share of the rows would
 * keep one thread busy while the others are done: such groups come first, one after another, on all threads. So do all
 * where there are too few for the threads.
 *
 * A weight that is stored with its columns first is the weight of the transposed layer: its y is that layer's dx, and
 * its dx that layer's y. With b^T for a and a^T for b the adapter is transposed, too. Few rows have a kernel of
 * their own there (turned_rows.inc). */
#include <string.h>

#include "../kernels.h"

namespace {
struct Grouped {
    const pk_lora_args *args;
    const int64_t *offsets;
    bool turned, backward;
    const int64_t *order; // groups that are tasks
    int failed;
};

int64_t size_of(int64_t dtype) { return dtype == PK_F32 ? 4 : 2; }

template <typename T> void advance(T *&pointer, int64_t bytes) {
    if (pointer) pointer = (T *)((char *)pointer + bytes);
}

// The arguments of a group of rows
pk_lora_args group(const Grouped &t, int64_t e, int64_t threads) {
    pk_lora_args g = *t.args;
    int64_t first = t.offsets[e], x_size = size_of(g.x_dtype), matrix = g.N * g.K;
    g.M = t.offsets[e + 1] - first, g.threads = threads;
    advance(g.x, first * g.K * x_size), advance(g.dx, first * g.K * x_size);
    advance(g.y, first * g.N * x_size), advance(g.dy, first * g.N * x_size);
    advance(g.s, first * g.r * 4);
    advance(g.a, e * g.r * g.K * size_of(g.a_dtype)), advance(g.da, e * g.r * g.K * size_of(g.a_dtype));
    advance(g.b, e * g.r * g.N * size_of(g.b_dtype)), advance(g.db, e * g.r * g.N * size_of(g.b_dtype));
    advance(g.bias, e * g.N * size_of(g.bias_dtype));
    if (g.quant_type == PK_DENSE) {
        advance(g.weight, e * matrix * size_of(g.w_dtype));
        return g;
    }
    if (pk_in_groups(g.quant_type)) {
        int64_t size = size_of(g.w_dtype), scales = g.blocksize > 0 ? (g.K + g.blocksize - 1) / g.blocksize * g.N : 0;
        advance(g.weight, g.quant_type == PK_INT4 ? e * matrix / 2 : e * g.N * pk_row_bytes(g.quant_type, g.K));
        advance(g.absmax, e * scales * size), advance(g.offset, e * scales * size);
        advance(g.nested_absmax, e * scales * (g.nested_blocksize == PK_U8 ? 1 : size));
        return g;
    }
    int64_t blocks = matrix / g.blocksize;
    advance(g.weight, e * matrix / 2), advance(g.absmax, e * blocks * (g.nested_code ? 1 : 4));
    if (g.nested_code) advance(g.nested_absmax, e * (blocks / g.nested_blocksize) * 4);
    return g;
}

// Its factors' gradients alone, or s alone, cost no product with the weight
pk_lora_args without_weight(pk_lora_args g) {
    g.N = 0, g.quant_type = PK_DENSE, g.w_dtype = PK_F32, g.weight = nullptr, g.bias = nullptr;
    return g;
}

// The transposed layer of a group: x and dx have N columns there, y and dy have K
pk_lora_args turned(const pk_lora_args &g) {
    pk_lora_args o = g;
    o.N = g.K, o.K = g.N, o.a = g.b, o.b = g.a, o.a_dtype = g.b_dtype, o.b_dtype = g.a_dtype;
    o.da = o.db = nullptr, o.bias = nullptr, o.x = o.dy = nullptr, o.y = o.dx = nullptr;
    return o;
}

int run(const pk_lora_args &g, bool is_turned, bool backward) {
    const PkTable *table = pk_table();
    bool factors = pk_wants_factors(&g);
    if (!is_turned && !backward) return table->lora_linear(&g, 1);
    if (!is_turned) {
        if (factors) { // s was not kept
            pk_lora_args s = without_weight(g);
            s.y = nullptr;
            if (int code = table->lora_linear(&s, 1)) return code;
        }
        return table->lora_linear_backward(&g, 1);
    }
    if (!backward && table->turned_rows_serve(&g)) return table->turned_rows(&g);
    pk_lora_args o = turned(g);
    if (!backward) {
        o.dy = g.x, o.dx = g.y;
        return table->lora_linear_dx(&o, g.bias);
    }
    o.x = g.dy, o.y = g.dx;
    if (int code = table->lora_linear(&o, 1)) return code; // and o.s, of the transposed layer
    if (!factors) return PK_OK;
    o.dy = g.x, o.da = g.db, o.db = g.da;
    return table->lora_linear_backward(&o, 1);
}

void task(void *ctx, int64_t i) {
    Grouped &t = *static_cast<Grouped *>(ctx);
    if (int code = run(group(t, t.order[i], 1), t.turned, t.backward))
        __atomic_store_n(&t.failed, code, __ATOMIC_RELAXED);
}

// Rows that no group has, and gradients of groups that have no rows
void zero_rest(const Grouped &t, int64_t E) {
    const pk_lora_args &args = *t.args;
    int64_t end = t.offsets[E], rest = args.M - end, size = size_of(args.x_dtype);
    void *out = t.backward ? args.dx : args.y;
    int64_t columns = t.backward ? args.K : args.N;
    if (out && rest) memset((char *)out + end * columns * size, 0, size_t(rest * columns * size));
    for (int64_t e = 0; t.backward && e < E; ++e) {
        if (t.offsets[e + 1] > t.offsets[e]) continue;
        int64_t a = args.r * args.K * size_of(args.a_dtype), b = args.r * args.N * size_of(args.b_dtype);
        if (args.da) memset((char *)args.da + e * a, 0, size_t(a));
        if (args.db) memset((char *)args.db + e * b, 0, size_t(b));
    }
}

int check(const pk_lora_args *args, const int64_t *offsets, int64_t E, bool is_turned, bool backward) {
    if (int code = pk_lora_check(args, backward)) return code;
    if (args->gain || args->adapters || (args->dropout_p > 0 && args->r > 0) || E < 0 || !offsets)
        return pk_fail(PK_ERR_ARGUMENT, "grouped_linear: no gain, no dropout, no adapters per row, and offsets of "
                       "0 groups or more, got %lld", (long long)E);
    for (int64_t e = 0; e <= E; ++e)
        if (offsets[e] < (e ? offsets[e - 1] : 0) || offsets[e] > args->M || (e == 0 && offsets[0]))
            return pk_fail(PK_ERR_ARGUMENT, "grouped_linear: offsets must begin at 0 and not fall, up to the %lld rows "
                           "of x, got %lld at place %lld", (long long)args->M, (long long)offsets[e], (long long)e);
    if (args->quant_type != PK_DENSE) {
        int64_t unit = args->blocksize * (args->nested_code ? args->nested_blocksize : 1);
        bool halves = args->quant_type <= PK_INT4; // of a byte
        if (pk_in_groups(args->quant_type)) unit = 1;
        if (is_turned || (E > 1 && (args->N * args->K % unit || (halves && args->N * args->K % 2))))
            return pk_fail(PK_ERR_ARGUMENT, "grouped_linear: a group's 4-bit weight must be whole blocks, %lld, row "
                           "after row", (long long)unit);
    }
    if (is_turned && backward && pk_wants_factors(args) && !args->dx && args->M > 0)
        return pk_fail(PK_ERR_ARGUMENT, "grouped_linear: da and db of turned weights come with dx");
    return PK_OK;
}

int grouped(const pk_lora_args *args, const int64_t *offsets, int64_t E, bool is_turned, bool backward) {
    if (int code = check(args, offsets, E, is_turned, backward)) return code;
    if (backward && !args->dx && !pk_wants_factors(args)) return PK_OK;
    int64_t *order = (int64_t *)pk_scratch(PK_OUTER_SLOT, size_t(E) * 8);
    if (!order) return pk_fail(PK_ERR_MEMORY, "grouped_linear: no memory for the order of %lld groups", (long long)E);
    Grouped t = {args, offsets, is_turned, backward, order, PK_OK};
    zero_rest(t, E);
    int64_t threads = args->threads > 1 ? args->threads : 1, found = 0, all = offsets[E];
    for (int64_t e = 0; e < E; ++e) found += offsets[e + 1] > offsets[e];
    bool few = found < threads;
    found = 0;
    for (int64_t e = 0; e < E && !t.failed; ++e) {
        int64_t rows = offsets[e + 1] - offsets[e];
        if (!rows) continue;
        if (few || rows * threads > all)
            t.failed = run(group(t, e, threads), is_turned, backward);
        else
            order[found++] = e;
    }
    if (!t.failed) pk_parallel(found, threads, task, &t);
    return t.failed ? pk_fail(t.failed, "grouped_linear: no memory for the workspace") : PK_OK;
}
} // namespace

extern "C" {
int pk_cpu_grouped_linear(const pk_lora_args *args, const int64_t *offsets, int64_t E, int64_t is_turned) {
    return grouped(args, offsets, E, is_turned != 0, false);
}

int pk_cpu_grouped_linear_backward(const pk_lora_args *args, const int64_t *offsets, int64_t E, int64_t is_turned) {
    return grouped(args, offsets, E, is_turned != 0, true);
}
}
