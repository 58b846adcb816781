/* AdamW over many tensors, and the norm of their gradients, as one list of tasks each. */
#include "kernels.h"

#include <math.h>

namespace {
enum { STEP = 16384 }; // elements a task, a multiple of every vector length

struct Tensors {
    const pk_adamw *list;
    int64_t count, *first; // of each tensor its first task
    const PkAdamw *of;     // of each
    double *sums;          // of each task
};

int64_t owner(const Tensors &t, int64_t task) {
    int64_t low = 0, high = t.count - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (t.first[middle] <= task)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

void update_task(void *ctx, int64_t task) {
    const Tensors &t = *static_cast<Tensors *>(ctx);
    int64_t i = owner(t, task), first = (task - t.first[i]) * STEP, end = first + STEP;
    pk_table()->adamw_range(t.of + i, t.list + i, first, end < t.list[i].numel ? end : t.list[i].numel);
}

void squares_task(void *ctx, int64_t task) {
    const Tensors &t = *static_cast<Tensors *>(ctx);
    int64_t i = owner(t, task), first = (task - t.first[i]) * STEP, end = first + STEP;
    t.sums[task] = pk_table()->squares_range(t.list[i].grad, first, end < t.list[i].numel ? end : t.list[i].numel);
}

// The number of tasks, -1 where a size is negative or memory short; tensors without elements have none
int64_t lay_out(Tensors *t) {
    t->first = static_cast<int64_t *>(pk_scratch(0, size_t(t->count) * 8));
    int64_t tasks = 0;
    for (int64_t i = 0; t->first && i < t->count; ++i) {
        if (t->list[i].numel < 0) return -1;
        t->first[i] = tasks, tasks += (t->list[i].numel + STEP - 1) / STEP;
    }
    return t->first ? tasks : -1;
}
} // namespace

extern "C" {
int pk_cpu_adamw(const pk_adamw *list, int64_t count, const double *settings, int64_t threads) {
    double rate = settings[0], beta1 = settings[1], beta2 = settings[2], eps = settings[3], decay = settings[4];
    Tensors t = {list, count, nullptr, nullptr, nullptr};
    PkAdamw *of = count < 0 ? nullptr : static_cast<PkAdamw *>(pk_scratch(1, size_t(count) * sizeof(PkAdamw)));
    int64_t tasks = of ? lay_out(&t) : -1;
    if (tasks < 0)
        return pk_fail(PK_ERR_ARGUMENT, "adamw: bad sizes (%lld tensors), or no memory for the workspace",
                       (long long)count);
    for (int64_t i = 0; i < count; ++i) {
        double step = double(*list[i].step) + 1.0;
        *list[i].step = float(step);
        if (i && of[i - 1].step == step) {
            of[i] = of[i - 1];
            continue;
        }
        double rest1 = 1.0 - pow(beta1, step), rest2 = 1.0 - pow(beta2, step);
        of[i] = {step, float(settings[5]), float(1.0 - beta1), float(beta2), float(1.0 - beta2),
                 float(1.0 / sqrt(rest2)), float(eps), float(rate * decay), float(rate / rest1)};
    }
    t.of = of;
    pk_parallel(tasks, threads, update_task, &t);
    return PK_OK;
}

int pk_cpu_squared_norm(const pk_adamw *list, int64_t count, double *square, int64_t threads) {
    Tensors t = {list, count, nullptr, nullptr, nullptr};
    int64_t tasks = count < 0 ? -1 : lay_out(&t);
    t.sums = tasks < 0 ? nullptr : static_cast<double *>(pk_scratch(1, size_t(tasks) * 8));
    if (!t.sums)
        return pk_fail(PK_ERR_ARGUMENT, "squared_norm: bad sizes (%lld tensors), or no memory for the workspace",
                       (long long)count);
    pk_parallel(tasks, threads, squares_task, &t);
    *square = 0;
    for (int64_t i = 0; i < tasks; ++i) *square += t.sums[i];
    return PK_OK;
}
}
