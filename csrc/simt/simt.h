/* A host stand-in for the CUDA that csrc/cuda uses, so that its sources run, slowly, on a machine with no GPU: for tests.
 *
 * The threads of a block are fibres of one OS thread; blocks run one after the other, so shared memory is static memory.
 * A barrier (of the block, or of a warp around a shuffle) switches fibres until its whole group has come; a thread that
 * has returned counts as come. If nobody can go on, the launch fails with cudaErrorLaunchTimeout: a barrier that not all
 * threads reach. Floating point is the host's IEEE arithmetic, compiled with -ffp-contract=off. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline __attribute__((always_inline))

typedef enum { cudaSuccess = 0, cudaErrorNoDevice = 100, cudaErrorLaunchTimeout = 702 } cudaError_t;
typedef void *cudaStream_t;

struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {
enum { WARP = 32, STACK = 64 << 10 };
enum State { READY, WAITS_BLOCK, WAITS_WARP, DONE };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    void *posted; /* what a warp's collective operation works on */
};

struct Machine {
    std::vector<Fibre> fibres;
    ucontext_t scheduler;
    unsigned current;
    void (*body)(void *);
    void *arguments;
    std::vector<uint4> shared;
};
inline Machine machine;
inline cudaError_t last_error = cudaSuccess;
} // namespace simt

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
inline void wait(State how) {
    Fibre &mine = machine.fibres[machine.current];
    mine.state = how;
    swapcontext(&mine.context, &machine.scheduler);
}

inline void enter() {
    machine.body(machine.arguments);
    machine.fibres[machine.current].state = DONE;
    swapcontext(&machine.fibres[machine.current].context, &machine.scheduler);
}

/* Frees [first, end) if all of them have come to the barrier `how` or returned, and at least one waits. */
inline bool release(unsigned first, unsigned end, State how) {
    bool waits = false;
    for (unsigned i = first; i < end; ++i) {
        State s = machine.fibres[i].state;
        if (s != how && s != DONE) return false;
        waits |= s == how;
    }
    for (unsigned i = first; waits && i < end; ++i)
        if (machine.fibres[i].state == how) machine.fibres[i].state = READY;
    return waits;
}

inline bool run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) {
        Fibre &f = machine.fibres[i];
        f.state = READY;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    for (;;) {
        bool moved = false, all_done = true;
        for (unsigned i = 0; i < threads; ++i) {
            Fibre &f = machine.fibres[i];
            if (f.state == READY) {
                machine.current = threadIdx.x = i;
                swapcontext(&machine.scheduler, &f.context);
                moved = true;
            }
            all_done &= f.state == DONE;
        }
        if (all_done) return true;
        for (unsigned i = 0; i < threads; i += WARP)
            moved |= release(i, std::min<unsigned>(i + WARP, threads), WAITS_WARP);
        moved |= release(0, threads, WAITS_BLOCK);
        if (!moved) return false;
    }
}

template <typename F> void launch(dim3 grid, unsigned threads, size_t shared_bytes, F call) {
    while (machine.fibres.size() < threads) {
        machine.fibres.emplace_back();
        machine.fibres.back().stack.reset(new char[STACK]);
    }
    machine.body = [](void *p) { (*static_cast<F *>(p))(); };
    machine.arguments = &call;
    machine.shared.resize(shared_bytes / 16 + 1);
    gridDim = grid, blockDim = dim3(threads);
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                memset(machine.shared.data(), 0xff, machine.shared.size() * sizeof(uint4));
                if (!run_block(threads)) {
                    last_error = cudaErrorLaunchTimeout;
                    return;
                }
            }
}
inline void *dynamic_shared() { return machine.shared.data(); }

/* An operation of a warp: every lane of `mask` hands over its part; the last to come runs it on all of them. */
typedef void (*Collective)(void *const *part, unsigned mask);
inline void collective(unsigned mask, Collective run, void *mine) {
    const unsigned me = machine.current, first = me / WARP * WARP;
    Fibre *lane = &machine.fibres[first];
    lane[me - first].posted = mine;
    void *part[WARP] = {};
    bool all = true;
    for (unsigned i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        part[i] = lane[i].posted;
        all &= first + i < blockDim.x && (first + i == me || lane[i].state == WAITS_WARP);
    }
    if (!all) return wait(WAITS_WARP);
    run(part, mask);
    for (unsigned i = 0; i < WARP; ++i)
        if (mask >> i & 1) lane[i].state = READY;
}

template <typename To, typename From> To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
    To out;
    memcpy(&out, &v, sizeof out);
    return out;
}
} // namespace simt

inline void __syncthreads() { simt::wait(simt::WAITS_BLOCK); }

namespace simt {
template <typename T> struct Shuffle {
    T value, out;
    int from;
};
/* Each lane gets the value of lane `from`. */
template <typename T> T shuffle(unsigned mask, T value, int from) {
    Shuffle<T> mine = {value, value, from};
    collective(mask, [](void *const *part, unsigned lanes) {
        for (int i = 0; i < WARP; ++i)
            if (lanes >> i & 1) {
                Shuffle<T> *to = static_cast<Shuffle<T> *>(part[i]);
                to->out = static_cast<Shuffle<T> *>(part[to->from])->value;
            }
    }, &mine);
    return mine.out;
}
/* The lanes whose predicate holds. */
inline unsigned vote(unsigned mask, bool predicate) {
    unsigned mine = predicate;
    collective(mask, [](void *const *part, unsigned lanes) {
        unsigned all = 0;
        for (int i = 0; i < WARP; ++i)
            if (lanes >> i & 1) all |= *static_cast<unsigned *>(part[i]) << i;
        for (int i = 0; i < WARP; ++i)
            if (lanes >> i & 1) *static_cast<unsigned *>(part[i]) = all;
    }, &mine);
    return mine;
}
inline int lane() { return static_cast<int>(machine.current % WARP); }
} // namespace simt
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::collective(mask, [](void *const *, unsigned) {}, nullptr); }
template <typename T> T __shfl_sync(unsigned mask, T value, int from) { return simt::shuffle(mask, value, from & 31); }
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int m) { return simt::shuffle(mask, value, simt::lane() ^ m); }
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned d) {
    const int from = simt::lane() + static_cast<int>(d);
    return simt::shuffle(mask, value, from > 31 ? simt::lane() : from);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned d) {
    const int from = simt::lane() - static_cast<int>(d);
    return simt::shuffle(mask, value, from < 0 ? simt::lane() : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return simt::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return simt::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt::vote(mask, predicate != 0) == mask; }
template <typename T> T __ldg(const T *p) { return *p; }
template <typename T> T atomicAdd(T *p, T v) {
    T old = *p;
    *p = old + v;
    return old;
}

inline float __uint_as_float(uint32_t v) { return simt::bits<float>(v); }
inline uint32_t __float_as_uint(float v) { return simt::bits<uint32_t>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
using std::max;
using std::min;

struct __nv_bfloat16 {
    uint16_t x;
};
struct __half {
    uint16_t x;
};
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(static_cast<uint32_t>(h.x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    uint32_t b = __float_as_uint(v);
    return {static_cast<uint16_t>(v != v ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}
inline float __half2float(__half h) { return static_cast<float>(simt::bits<_Float16>(h.x)); }
inline __half __float2half_rn(float v) { return {simt::bits<uint16_t>(static_cast<_Float16>(v))}; }
inline __half __ushort_as_half(unsigned short v) { return {v}; }

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorNoDevice; }
inline cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() {
    cudaError_t error = simt::last_error;
    simt::last_error = cudaSuccess;
    return error;
}
inline const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaSuccess ? "cudaSuccess" : (e == cudaErrorNoDevice ? "cudaErrorNoDevice" : "cudaErrorLaunchTimeout");
}
inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorLaunchTimeout ? "a barrier that not all threads reach" : "host stand-in for CUDA";
}
