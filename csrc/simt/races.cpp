/* Races: the compiler's -fsanitize=thread reports every load and store of a kernel to the functions at the end of this
 * file (no ThreadSanitizer runtime is linked), and -fsanitize=alignment every misaligned address. Of each byte of
 * shared and global memory the last write and up to two reads since are known. Two accesses by different threads, one
 * of them a write, are a race unless
 *   - a __syncthreads lies between them (shared memory also begins anew with each block), or
 *   - they are of two blocks, and one handed its work over to the other, by PTX's release and acquire patterns: one
 *     thread's __threadfence, then its atomic; another's atomic on the same address, then its __threadfence. Other
 *     threads of the blocks join in by a __syncthreads before the first fence and after the second: fences of their
 *     own do not count, or
 *   - both threads are of one warp and __syncwarp orders them (vector clocks within the warp), or
 *   - both are atomic.
 * A launch that may begin before the one before it has ended is parallel to that one until the thread has waited for
 * it, whatever ran first here. Loads by ld.global.nc must not meet a write of their own launch, nor of one that was
 * under way when it began.
 * Two reads are enough to find a race with every later write, unless __syncwarp is used on parts of a warp. */
#include <stdio.h>

#include <memory>
#include <unordered_map>

#include "machine.h"

namespace simt {
namespace {
struct Seen {
    uint32_t stamp = 0; /* which stretch between barriers; 0: never */
    uint32_t clock = 0; /* of the thread */
    uint16_t thread = 0;
    bool atomic = false;
    uint32_t fences = 0; /* that the thread had made */
    const void *pc = nullptr;
};
struct Byte {
    Seen write, read[2];
    uint32_t block = 0;    /* shared memory: the block that has written it */
    bool pending = false;  /* a cp.async that nobody has waited for */
};

uint32_t now = 1, block_began = 1, launch_began = 1; /* stamps */
uint32_t under_way = 1; /* what is younger was written since the oldest launch that runs beside this one began */
bool waited[MOST_THREADS]; /* for the launch before: for it, nothing runs beside this launch */
uint32_t clocks[MOST_THREADS][WARP];                  /* what each thread knows of the lanes of its warp */
std::unique_ptr<Byte[]> of_shared;
size_t of_shared_size = 0;

constexpr uintptr_t PAGE = 1024;
constexpr size_t MOST_PAGES = 4096;
std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
uintptr_t last_page = ~uintptr_t(0);
Byte *last_bytes = nullptr;

Byte *global_byte(uintptr_t at) {
    if (at / PAGE != last_page) {
        std::unique_ptr<Byte[]> &page = pages[at / PAGE];
        if (!page) page.reset(new Byte[PAGE]);
        last_page = at / PAGE, last_bytes = page.get();
    }
    return last_bytes + at % PAGE;
}

bool another_block(const Seen &seen, unsigned me, bool shared) {
    return !shared && seen.stamp >= (waited[me] ? launch_began : under_way) && seen.stamp < block_began;
}

/* ---- what blocks hand over to one another ---- */
struct Fence {
    uint32_t count = 0, stamp = 0; /* of the last one */
} fences[MOST_THREADS];

struct Release { /* an atomic of a thread that has made a fence */
    uint32_t began, ended; /* stamps of its block */
    unsigned thread;
    Fence fence;
};
struct Acquired { /* an atomic after it, by `thread` of the block that runs */
    std::shared_ptr<Release> release;
    unsigned thread;
    uint32_t fenced; /* stamp of that thread's next fence; 0: not yet */
};
std::unordered_map<uintptr_t, std::vector<std::shared_ptr<Release>>> releases; /* by address */
std::vector<Acquired> acquired;

void meet(uintptr_t address, unsigned me) {
    auto found = releases.find(address);
    if (found != releases.end())
        for (const auto &release : found->second)
            if (release->ended < block_began) acquired.push_back({release, me, 0});
    if (fences[me].count)
        releases[address].push_back(std::make_shared<Release>(Release{block_began, now, me, fences[me]}));
}

bool handed_over(const Seen &seen, unsigned me) {
    for (const Acquired &a : acquired) {
        const Release &r = *a.release;
        if (seen.stamp < r.began || seen.stamp > r.ended) continue;
        if (seen.thread == r.thread ? seen.fences >= r.fence.count : seen.stamp >= r.fence.stamp) continue;
        if (a.fenced && (a.thread == me || a.fenced < now)) return true;
    }
    return false;
}

bool parallel(const Seen &seen, unsigned me, bool shared) {
    if (seen.stamp != now) return another_block(seen, me, shared) && !handed_over(seen, me);
    if (seen.thread == me) return false;
    if (seen.thread / WARP != me / WARP) return true;
    return clocks[me][seen.thread % WARP] < seen.clock;
}

void say_place(const void *p, bool shared, char *text, size_t size) {
    const Range dynamic = dynamic_range();
    if (dynamic.holds(p)) {
        snprintf(text, size, "dynamic shared memory + %zu",
                 static_cast<size_t>(static_cast<const char *>(p) - dynamic.first));
    } else if (shared) {
        describe(p, text, size);
        for (char *name; (name = strstr(text, "::"));) memmove(text, name + 2, strlen(name + 2) + 1);
    } else {
        snprintf(text, size, "global memory at %p", p);
    }
}

[[noreturn]] void race(const char *what, const void *p, bool shared, unsigned me, const void *pc, const Seen &other,
                       const char *before) {
    char place[120] = "", here[120] = "", there[120] = "";
    say_place(p, shared, place, sizeof place);
    describe(pc, here, sizeof here);
    describe(other.pc, there, sizeof there);
    const char *whose = other.stamp >= block_began  ? ""
                        : other.stamp >= launch_began ? " of another block"
                                                      : " of the launch before";
    fail(cudaErrorLaunchFailure, "race: thread %u %s %s (%s) that thread %u%s %s (%s) with no barrier between", me,
         what, place, here, other.thread, whose, before, there);
}

const char *verb(Access how, bool past) {
    if (how == READ || how == READ_ONLY) return past ? "has read" : "reads";
    if (how == ATOMIC) return past ? "has changed" : "changes";
    return past ? "has written" : "writes";
}

void check(Byte &b, const void *p, Access how, unsigned me, const void *pc, bool shared) {
    const bool reads = how == READ || how == READ_ONLY || how == ATOMIC, atomic = how == ATOMIC;
    if (b.pending && b.block == block_began && shared && how != LAND) {
        char place[120] = "";
        say_place(p, shared, place, sizeof place);
        fail(cudaErrorLaunchFailure,
             "thread %u %s %s, where a cp.async of thread %u is under way: nobody has waited for it", me,
             verb(how, false), place, b.write.thread);
    }
    if (reads && shared && b.block != block_began) {
        char place[120] = "", here[120] = "";
        say_place(p, shared, place, sizeof place);
        describe(pc, here, sizeof here);
        fail(cudaErrorLaunchFailure, "thread %u reads %s (%s) that no thread of this block has written yet", me, place,
             here);
    }
    if (b.write.stamp && !(atomic && b.write.atomic) && parallel(b.write, me, shared))
        race(verb(how, false), p, shared, me, pc, b.write, verb(b.write.atomic ? ATOMIC : WRITE, true));
    if (how == READ_ONLY && b.write.stamp >= under_way) {
        char place[120] = "", here[120] = "", there[120] = "";
        say_place(p, shared, place, sizeof place);
        describe(pc, here, sizeof here);
        describe(b.write.pc, there, sizeof there);
        fail(cudaErrorLaunchFailure,
             "thread %u reads %s (%s) by ld.global.nc, which is for what nobody writes while the launch lasts; thread "
             "%u has written it (%s)", me, place, here, b.write.thread, there);
    }
    const uint32_t clock = clocks[me][me % WARP];
    const Seen mine = {now, clock, static_cast<uint16_t>(me), atomic, fences[me].count, pc};
    if (how == READ || how == READ_ONLY) {
        Seen &a = b.read[0], &c = b.read[1];
        if (another_block(a, me, shared))
            c = mine; /* enough for a race with any write of this block */
        else if (a.stamp != now || !parallel(a, me, shared))
            a = mine;
        else if (c.stamp != now || !parallel(c, me, shared) || c.thread / WARP == a.thread / WARP)
            c = mine;
        return;
    }
    for (const Seen &read : b.read)
        if (read.stamp && parallel(read, me, shared)) race(verb(how, false), p, shared, me, pc, read, verb(READ, true));
    b.write = mine;
    b.block = block_began;
    b.pending = how == ISSUE;
}
} // namespace

void races_launch(size_t shared_bytes, bool after) {
    if (pages.size() > MOST_PAGES && !after) pages.clear();
    releases.clear();
    last_page = ~uintptr_t(0);
    under_way = launch_began, launch_began = ++now;
    if (!after) under_way = launch_began;
    for (unsigned i = 0; i < MOST_THREADS; ++i) clocks[i][i % WARP] += !clocks[i][i % WARP];
    if (shared_bytes > of_shared_size) of_shared.reset(new Byte[of_shared_size = shared_bytes]);
}
void races_waited() { waited[current()] = true; }
void races_block() {
    block_began = ++now;
    memset(waited, 0, sizeof waited);
    acquired.clear();
    memset(static_cast<void *>(fences), 0, sizeof fences);
}
void races_barrier() { ++now; }
void races_fence() {
    const unsigned me = current();
    fences[me] = {fences[me].count + 1, now};
    for (Acquired &a : acquired)
        if (a.thread == me && !a.fenced) a.fenced = now;
}

/* The lanes learn all that any of them knows; what each does from here on is news. */
void races_warp(unsigned first, unsigned lanes) {
    uint32_t all[WARP] = {};
    for (unsigned i = 0; i < WARP; ++i)
        if (lanes >> i & 1)
            for (unsigned k = 0; k < WARP; ++k) all[k] = all[k] > clocks[first + i][k] ? all[k] : clocks[first + i][k];
    for (unsigned i = 0; i < WARP; ++i) {
        if (!(lanes >> i & 1)) continue;
        memcpy(clocks[first + i], all, sizeof all);
        ++clocks[first + i][i];
    }
}

void touch(const void *p, size_t bytes, Access how, unsigned thread, const void *pc) {
    const char *at = static_cast<const char *>(p);
    const ptrdiff_t offset = shared_offset(p, bytes);
    if (offset >= 0) {
        for (size_t i = 0; i < bytes; ++i)
            check(of_shared[static_cast<size_t>(offset) + i], at + i, how, thread, pc, true);
    } else if (shared_offset(p, 1) >= 0) {
        char place[120] = "";
        say_place(p, true, place, sizeof place);
        fail(cudaErrorIllegalAddress, "thread %u %s %zu bytes at %s, past its end", thread, verb(how, false), bytes,
             place);
    } else if (image().holds(p)) {
        if (how != READ && how != READ_ONLY) { /* constants and threadIdx are read */
            char place[120] = "", here[120] = "";
            describe(p, place, sizeof place);
            describe(pc, here, sizeof here);
            fail(cudaErrorIllegalAddress,
                 "thread %u (%s) %s %s at %p, which is no shared memory of this kernel: past the "
                 "end of a variable, or __shared__ in a function that the kernel calls",
                 thread, here, verb(how, false), place, p);
        }
    } else if (!stacks().holds(p) && !arguments().holds(p)) {
        if (how == ATOMIC) meet(reinterpret_cast<uintptr_t>(p), thread);
        for (size_t i = 0; i < bytes; ++i)
            check(*global_byte(reinterpret_cast<uintptr_t>(at) + i), at + i, how, thread, pc, false);
    }
}

namespace {
/* Host code of the library runs outside the stacks of the machine, on another OS thread perhaps. */
bool in_kernel() { return current() != NONE && stacks().holds(__builtin_frame_address(0)); }

void report(const void *p, size_t bytes, Access how, const void *pc) {
    if (in_kernel() && !stacks().holds(p)) touch(p, bytes, how, current(), pc);
}

/* The argument that -fsanitize=alignment hands over. */
struct TypeMismatch {
    const char *file;
    uint32_t line, column;
    const void *type;
    unsigned char log_alignment, kind;
};
void misaligned(const TypeMismatch *at, const void *p) {
    if (!in_kernel()) return;
    const char *name = strrchr(at->file, '/');
    fail(cudaErrorMisalignedAddress, "thread %u (%s:%u) uses the address %p, which is not a multiple of %u", current(),
         name ? name + 1 : at->file, at->line, p, 1u << at->log_alignment);
}
} // namespace
} // namespace simt

/* The functions that instrumented code calls; names and arguments are the compilers'. */
#define PK_TSAN extern "C" __attribute__((visibility("hidden")))
#define PK_PC __builtin_return_address(0)
#define PK_TSAN_SIZE(n)                                                                                                \
    PK_TSAN void __tsan_read##n(void *p) { simt::report(p, n, simt::READ, PK_PC); }                                 \
    PK_TSAN void __tsan_write##n(void *p) { simt::report(p, n, simt::WRITE, PK_PC); }                               \
    PK_TSAN void __tsan_unaligned_read##n(void *p) { simt::report(p, n, simt::READ, PK_PC); }                       \
    PK_TSAN void __tsan_unaligned_write##n(void *p) { simt::report(p, n, simt::WRITE, PK_PC); }
PK_TSAN_SIZE(1)
PK_TSAN_SIZE(2)
PK_TSAN_SIZE(4)
PK_TSAN_SIZE(8)
PK_TSAN_SIZE(16)
PK_TSAN void __tsan_read_range(void *p, size_t n) { simt::report(p, n, simt::READ, PK_PC); }
PK_TSAN void __tsan_write_range(void *p, size_t n) { simt::report(p, n, simt::WRITE, PK_PC); }
PK_TSAN void __ubsan_handle_type_mismatch_v1(simt::TypeMismatch *at, void *p) { simt::misaligned(at, p); }
PK_TSAN void __tsan_init() {}
PK_TSAN void __tsan_func_entry(void *) {}
PK_TSAN void __tsan_func_exit(void *) {}
PK_TSAN void __tsan_vptr_update(void **, void *) {}
PK_TSAN void __tsan_vptr_read(void **) {}
/* by clang; g++ reports copies of whole objects as ranges, and does not see a memcpy that stays a call */
PK_TSAN void *__tsan_memcpy(void *to, const void *from, size_t n) {
    simt::report(from, n, simt::READ, PK_PC);
    simt::report(to, n, simt::WRITE, PK_PC);
    return memmove(to, from, n);
}
PK_TSAN void *__tsan_memmove(void *to, const void *from, size_t n) { return __tsan_memcpy(to, from, n); }
PK_TSAN void *__tsan_memset(void *to, int value, size_t n) {
    simt::report(to, n, simt::WRITE, PK_PC);
    return memset(to, value, n);
}
