/* Barriers, shuffles, votes and atomics. Shuffles and votes order no memory: only __syncwarp and __syncthreads do. */
#pragma once
#include "machine.h"
#include "numbers.h"

inline void __syncthreads(simt::Where where = {}) { simt::sync_block(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = {}) {
    simt::collective("__syncwarp", where, simt::ORDERS, mask, [](void *const *, unsigned) {}, nullptr);
}

namespace simt {
template <typename T> struct Shuffle {
    T value, out;
    unsigned from;
};
/* Each lane gets the value of lane `from`. */
template <typename T> T shuffle(const char *what, Where where, unsigned mask, T value, unsigned from) {
    Shuffle<T> mine = {value, value, from};
    collective(
        what, where, PLAIN, mask,
        [](void *const *part, unsigned lanes) PK_SIMT_UNSEEN {
            for (unsigned i = 0; i < WARP; ++i) {
                if (!(lanes >> i & 1)) continue;
                Shuffle<T> *to = static_cast<Shuffle<T> *>(part[i]);
                if (!(lanes >> to->from & 1))
                    fail(cudaErrorLaunchFailure, "a shuffle in which lane %u reads from lane %u, which takes no part",
                         i, to->from);
                to->out = static_cast<Shuffle<T> *>(part[to->from])->value;
            }
        },
        &mine);
    return mine.out;
}
/* The lanes that take part, and those of them whose predicate holds. */
struct Vote {
    unsigned lanes, yes;
};
inline Vote vote(const char *what, Where where, unsigned mask, bool predicate) {
    Vote mine = {0, predicate};
    collective(
        what, where, PLAIN, mask,
        [](void *const *part, unsigned lanes) PK_SIMT_UNSEEN {
            unsigned yes = 0;
            for (unsigned i = 0; i < WARP; ++i)
                if (lanes >> i & 1) yes |= static_cast<Vote *>(part[i])->yes << i;
            for (unsigned i = 0; i < WARP; ++i)
                if (lanes >> i & 1) *static_cast<Vote *>(part[i]) = {lanes, yes};
        },
        &mine);
    return mine;
}
} // namespace simt

/* Sections of `width` lanes, a power of two; out of its section a lane reads itself. */
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, simt::Where where = {}) {
    const unsigned w = static_cast<unsigned>(width), first = simt::lane() & ~(w - 1);
    return simt::shuffle("__shfl_sync", where, mask, value, first + (static_cast<unsigned>(from) & (w - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, simt::Where where = {}) {
    const unsigned me = simt::lane(), other = me ^ static_cast<unsigned>(flip), w = static_cast<unsigned>(width);
    return simt::shuffle("__shfl_xor_sync", where, mask, value, other < (me & ~(w - 1)) + w ? other : me);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Where where = {}) {
    const unsigned me = simt::lane(), end = (me & ~(static_cast<unsigned>(width) - 1)) + static_cast<unsigned>(width);
    return simt::shuffle("__shfl_down_sync", where, mask, value, me + by < end ? me + by : me);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Where where = {}) {
    const unsigned me = simt::lane(), first = me & ~(static_cast<unsigned>(width) - 1);
    return simt::shuffle("__shfl_up_sync", where, mask, value, me >= first + by ? me - by : me);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = {}) {
    return simt::vote("__ballot_sync", where, mask, predicate != 0).yes;
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = {}) {
    return simt::vote("__any_sync", where, mask, predicate != 0).yes != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = {}) {
    const simt::Vote v = simt::vote("__all_sync", where, mask, predicate != 0);
    return v.yes == v.lanes;
}

namespace simt {
/* ld.global.nc: of what nobody writes while the launch lasts */
template <typename T> PK_SIMT_UNSEEN T read_only(const T *p) {
    touch(p, sizeof(T), READ_ONLY, current(), __builtin_return_address(0));
    return *p;
}
} // namespace simt
template <typename T> T __ldg(const T *p) { return simt::read_only(p); }
inline void __threadfence() { simt::races_fence(); }
inline void __trap() { simt::fail(cudaErrorLaunchFailure, "__trap()"); }

namespace simt {
/* Fibres change over at barriers only, so a plain read and write are one step. */
template <typename T, typename Change> PK_SIMT_UNSEEN T atomic(T *p, Change change) {
    static_assert(T(3) / T(2) == T(1), "integers only: the order of float atomics would show in the result");
    touch(p, sizeof(T), ATOMIC, current(), __builtin_return_address(0));
    const T old = *p;
    *p = change(old);
    return old;
}
} // namespace simt
#define PK_SIMT_ATOMIC(name, expression)                                                                               \
    template <typename T> T name(T *p, T v) {                                                                          \
        return simt::atomic(p, [v](T old) { return static_cast<T>(expression); });                                     \
    }
PK_SIMT_ATOMIC(atomicAdd, old + v)
PK_SIMT_ATOMIC(atomicSub, old - v)
PK_SIMT_ATOMIC(atomicMax, old < v ? v : old)
PK_SIMT_ATOMIC(atomicMin, v < old ? v : old)
PK_SIMT_ATOMIC(atomicAnd, old & v)
PK_SIMT_ATOMIC(atomicOr, old | v)
PK_SIMT_ATOMIC(atomicXor, old ^ v)
PK_SIMT_ATOMIC(atomicExch, (static_cast<void>(old), v))
#undef PK_SIMT_ATOMIC
template <typename T> T atomicCAS(T *p, T expected, T v) {
    return simt::atomic(p, [=](T old) { return old == expected ? v : old; });
}
