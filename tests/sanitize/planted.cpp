/* Faults as kernels could have them, one a name, compiled and linked as the library is: that the sanitizers find each
 * says that they are on. `planted NAME 1` has the fault, `planted NAME 0` its correct twin. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/cpu/kernels.h"
#include "team.h"

namespace {
volatile bool fault;
volatile int64_t one = 1;

struct Sums {
    const float *x;
    float *y;
    int64_t n;
};
void sum_of_task(void *p, int64_t task) {
    auto *s = static_cast<Sums *>(p);
    for (int64_t i = 0; i < s->n; ++i) s->y[task] += s->x[i];
}
float sums(int64_t read, int64_t written) { // 10 numbers, 4 sums
    Sums s = {static_cast<float *>(calloc(10, 4)), static_cast<float *>(calloc(4, 4)), read};
    pk_parallel(written, 2, sum_of_task, &s);
    float first = s.y[0];
    free(const_cast<float *>(s.x)), free(s.y);
    return first;
}

void heap_read_beyond() { sums(10 + fault, 4); }
void heap_write_beyond() { sums(10, 4 + fault); }
void scratch_beyond() { // workspace comes in whole pages: within them, what was not asked for is poisoned
    auto *p = static_cast<volatile float *>(pk_scratch(3, 40));
    p[9 + fault] = 1;
}
void scratch_of_before() { // after a larger piece, a smaller one of the same memory
    pk_scratch(3, 4000);
    auto *p = static_cast<volatile float *>(pk_scratch(3, 40));
    p[9 + fault] = 1;
}
void signed_overflow() { printf("%lld\n", (long long)((INT64_MAX - 1) + one + fault)); }
void misaligned() {
    char *p = static_cast<char *>(calloc(8, 1));
    printf("%d\n", int(*reinterpret_cast<volatile int32_t *>(p + 2 * fault)));
    free(p);
}
void shift() { printf("%d\n", 1 << (31 * one - 1 + 2 * fault)); }

int64_t counter;
int threads; // of the team that have begun: one of them may be done with all tasks before another is there
thread_local bool begun;
void count(void *, int64_t) {
    if (!begun) begun = true, __atomic_fetch_add(&threads, 1, __ATOMIC_RELAXED);
    while (__atomic_load_n(&threads, __ATOMIC_RELAXED) < 2)
        std::this_thread::yield();
    if (fault)
        ++counter;
    else
        __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
}
void race_of_tasks() { pk_parallel(10000, 4, count, nullptr); }
void race_of_callers() { // a table that the first call makes
    auto call = [] {
        static bool made = false, *seen = &made;
        if (fault) {
            if (!*seen) *seen = true;
        } else if (!__atomic_load_n(seen, __ATOMIC_ACQUIRE)) {
            __atomic_store_n(seen, true, __ATOMIC_RELEASE);
        }
    };
    std::thread a(call), b(call);
    a.join(), b.join();
}
} // namespace

int main(int given, char **words) {
    const struct {
        const char *name;
        void (*run)();
    } all[] = {
#define CASE(name) {#name, name}
        CASE(heap_read_beyond), CASE(heap_write_beyond), CASE(scratch_beyond), CASE(scratch_of_before),
        CASE(signed_overflow), CASE(misaligned), CASE(shift), CASE(race_of_tasks), CASE(race_of_callers),
    };
    for (auto &one_of : all)
        if (given == 3 && !strcmp(one_of.name, words[1])) {
            fault = *words[2] == '1';
            one_of.run();
            return 0;
        }
    return 2;
}
