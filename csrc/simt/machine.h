/* Shared by the headers of the stand-in and its runtime (machine.cpp, races.cpp). */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <memory>
#include <vector>

typedef enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoDevice = 100,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchTimeout = 702,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719
} cudaError_t;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

cudaError_t cudaGetLastError();
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);

namespace simt {
constexpr unsigned WARP = 32, MOST_THREADS = 1024;
/* The GPU that this is taken for (pk_simt_set_device). shared: the most dynamic bytes a block. */
struct Device {
    int major, minor, processors;
    unsigned shared;
};
extern Device device;

/* A place in a kernel, as a default argument of what is called there. */
struct Where {
    const char *file;
    int line;
    Where(const char *f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
};

/* Ends the launch with this error (printf style); does not return to the kernel. */
[[noreturn]] void fail(cudaError_t error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A launch, with a copy of its arguments: it may run later than it is queued (launches.cpp). */
struct Launch {
    const char *name;
    const void *kernel;
    dim3 grid;
    unsigned threads;
    size_t shared_bytes;
    bool after; /* may begin before the one before it has ended */
    void *arguments;
    size_t argument_bytes;
    void (*body)(void *), (*drop)(void *);
};
void queue(Launch launch);
void flush(); /* what is queued has run */
void count_launch(); /* of what is no kernel */
/* call(kernel) runs in every thread. The kernel goes through memory so that it stays a function with a name. */
template <typename Kernel, typename Call>
void launch(const char *name, dim3 grid, unsigned threads, size_t shared_bytes, bool after, Kernel *kernel, Call call) {
    struct Both {
        Kernel *kernel;
        Call call;
    };
    queue({name, reinterpret_cast<const void *>(kernel), grid, threads, shared_bytes, after, new Both{kernel, call},
           sizeof(Both), [](void *p) { static_cast<Both *>(p)->call(static_cast<Both *>(p)->kernel); },
           [](void *p) { delete static_cast<Both *>(p); }});
}

void *dynamic_shared();
/* Where [p, p + bytes) lies in the shared memory of the block, dynamic and then each static variable; -1: not in one of
 * them. */
ptrdiff_t shared_offset(const void *p, size_t bytes);
inline bool is_shared(const void *p, size_t bytes) { return shared_offset(p, bytes) >= 0; }
unsigned lane();
uint32_t draw(uint32_t below); /* of the seed's random numbers */

/* An operation of a warp: every lane of `mask` that has not returned hands over its `part`; the last to come runs it
 * on all of them (NULL for lanes outside `lanes`). WHOLE: needs 32 lanes (.aligned in PTX). ORDERS: a memory barrier
 * as well. */
typedef void (*Collective)(void *const *part, unsigned lanes);
enum Kind { PLAIN = 0, WHOLE = 1, ORDERS = 2 };
void collective(const char *what, Where where, Kind kind, unsigned mask, Collective run, void *part);
void sync_block(Where where);
void wait_for_previous(Where where);
void release_next();

void async_block(); /* a block starts: no cp.async is under way (ptx.cpp) */
std::shared_ptr<void> async_put_aside(); /* those of a block that is interrupted */
void async_take_up(const std::shared_ptr<void> &put_aside);

/* Reports to races.cpp of accesses that no compiler reports; empty in builds without it. */
/* ISSUE, LAND: of a cp.async, when it starts and when it is waited for. READ_ONLY: a load by ld.global.nc */
enum Access { READ, WRITE, ATOMIC, ISSUE, LAND, READ_ONLY };
#if defined(PK_SIMT_RACES)
void touch(const void *p, size_t bytes, Access how, unsigned thread, const void *pc);
void races_launch(size_t shared_bytes, bool after); /* dynamic and static */
void races_block();                                 /* a block starts */
void races_waited();                                /* the thread, for the launch before */
void races_barrier();
void races_warp(unsigned first, unsigned lanes);
void races_fence();
#define PK_SIMT_UNSEEN __attribute__((no_sanitize("thread")))
#else
inline void touch(const void *, size_t, Access, unsigned, const void *) {}
inline void races_launch(size_t, bool) {}
inline void races_block() {}
inline void races_waited() {}
inline void races_barrier() {}
inline void races_warp(unsigned, unsigned) {}
inline void races_fence() {}
#define PK_SIMT_UNSEEN
#endif
unsigned current(); /* the running thread; NONE outside kernels */
constexpr unsigned NONE = ~0u;

/* Memory of the machine, for races.cpp. */
struct Range {
    const char *first, *end;
    bool holds(const void *p) const { return p >= first && p < end; }
    size_t size() const { return static_cast<size_t>(end - first); }
};
Range dynamic_range();
Range stacks();
Range arguments(); /* of the launch that runs */

/* symbols.cpp, from the symbol table of the library that all this is linked into. */
Range image();                                       /* its code, constants and variables */
std::vector<Range> shared_of(const void *kernel);    /* the __shared__ variables declared in a kernel */
/* The function or variable that holds the address, as name or name + bytes; "" where there is none. */
void describe(const void *address, char *text, size_t size);
} // namespace simt
