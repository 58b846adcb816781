/* The machine of simt.h: who runs next, what a barrier and a warp's operation wait for, and what is said when they
 * fail. */
#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../pk_abi.h"
#include "fibre.h"

#if defined(PK_SIMT_SWITCH)
PK_SIMT_SWITCH
#endif

dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace simt {
Device device = {8, 9, 108, 99 << 10};
namespace {
constexpr size_t STACK = 256 << 10;
enum State : uint8_t { READY, AT_BLOCK, AT_WARP, RETURNED };

struct Thread {
    Fibre fibre;
    State state;
    Where where{"", 0}; /* what it waits at */
    const char *what;
    unsigned mask;
    Kind kind;
    Collective run;
    void *part;
};

struct Machine {
    std::mutex one_launch;
    std::vector<Thread> threads;
    char *stacks = nullptr;
    Fibre host;
    unsigned count = 0, now = NONE, at_block = 0, returned = 0, ready_count = 0;
    unsigned ready[MOST_THREADS];
    unsigned waiting[MOST_THREADS / WARP], gone[MOST_THREADS / WARP]; /* lanes of each warp */
    void (*body)(void *) = nullptr;
    void *arguments = nullptr;
    const char *name = "";
    const void *kernel = nullptr;
    std::vector<Range> shared; /* dynamic, then static, of the kernel that runs */
    uint64_t seed = 0, random = 1;
    cudaError_t failed = cudaSuccess;
    const char *host_frame = nullptr;
} m;

thread_local cudaError_t last_error = cudaSuccess;
thread_local char last_text[640] = "";

void seed_random(uint64_t value) {
    value += 0x9e3779b97f4a7c15u; /* splitmix64 */
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
    value = (value ^ value >> 27) * 0x94d049bb133111ebu;
    m.random = (value ^ value >> 31) | 1;
}

/* fill() and what it is for: not through memset, which AddressSanitizer would check against the gaps between
 * variables */
__attribute__((no_sanitize("address"))) void fill(char *p, size_t bytes) {
    for (; bytes && reinterpret_cast<uintptr_t>(p) % 8; --bytes) *p++ = -1;
    uint64_t volatile *words = reinterpret_cast<uint64_t volatile *>(p);
    for (size_t i = 0; i < bytes / 8; ++i) words[i] = ~uint64_t(0);
    for (size_t i = bytes / 8 * 8; i < bytes; ++i) *static_cast<char volatile *>(p + i) = -1;
}

void go(unsigned next, bool last = false) {
    Fibre &from = m.now == NONE ? m.host : m.threads[m.now].fibre;
    Fibre &to = next == NONE ? m.host : m.threads[next].fibre;
    if (&from == &to) return;
    m.now = threadIdx.x = next;
    change(from, to, m.host, last);
}

/* Any of those who can run; the host where nobody can. */
unsigned pick() {
    if (!m.ready_count) return NONE;
    const unsigned i = draw(m.ready_count), thread = m.ready[i];
    m.ready[i] = m.ready[--m.ready_count];
    return thread;
}

void make_ready(unsigned thread) {
    m.threads[thread].state = READY;
    m.ready[m.ready_count++] = thread;
}

struct Text {
    char *at, *end;
    void add(const char *format, ...) __attribute__((format(printf, 2, 3))) {
        va_list list;
        va_start(list, format);
        const int n = vsnprintf(at, static_cast<size_t>(end - at), format, list);
        va_end(list);
        at = n < end - at ? at + n : end - 1;
    }
};

bool same(const char *a, const char *b) { return a == b || !strcmp(a, b); }

bool together(const Thread &a, const Thread &b) {
    if (a.state != b.state || a.state == RETURNED) return a.state == b.state;
    return a.where.line == b.where.line && same(a.where.file, b.where.file) && same(a.what, b.what) &&
           (a.state != AT_WARP || (a.mask == b.mask && a.run == b.run));
}

/* "threads 0-31, 40 wait at __syncthreads (a.cu:12); 32-39 have returned" for the threads [first, end). */
void say_where(Text &text, unsigned first, unsigned end) {
    bool said[MOST_THREADS] = {};
    for (unsigned i = first; i < end; ++i) {
        if (said[i]) continue;
        const Thread &t = m.threads[i];
        text.add("%s", i == first ? "threads " : "; ");
        for (unsigned j = i, n = 0; j < end; ++j) {
            if (said[j] || !together(t, m.threads[j])) continue;
            unsigned k = j;
            while (k < end && together(t, m.threads[k])) said[k++] = true;
            text.add(k - j > 1 ? "%s%u-%u" : "%s%u", n++ ? ", " : "", j, k - 1);
        }
        const char *file = strrchr(t.where.file, '/') ? strrchr(t.where.file, '/') + 1 : t.where.file;
        if (t.state == RETURNED)
            text.add(" have returned");
        else if (t.state == READY)
            text.add(" are on their way");
        else if (t.state == AT_BLOCK)
            text.add(" wait at %s (%s:%d)", t.what, file, t.where.line);
        else
            text.add(" wait at %s (%s:%d, mask 0x%08x)", t.what, file, t.where.line, t.mask);
    }
}

void report(cudaError_t error, const char *format, va_list list) {
    char what[400], kernel[160] = "";
    vsnprintf(what, sizeof what, format, list);
    if (m.kernel) describe(m.kernel, kernel, sizeof kernel);
    snprintf(last_text, sizeof last_text, "kernel %s, block (%u, %u, %u): %s", kernel[0] ? kernel : m.name, blockIdx.x,
             blockIdx.y, blockIdx.z, what);
    m.failed = last_error = error;
}
__attribute__((format(printf, 2, 3))) void report(cudaError_t error, const char *format, ...) {
    va_list list;
    va_start(list, format);
    report(error, format, list);
    va_end(list);
}

[[noreturn]] void fail_together(const char *why, unsigned first, unsigned end) {
    char where[400];
    Text text = {where, where + sizeof where};
    say_where(text, first, end);
    fail(cudaErrorLaunchTimeout, "%s: %s", why, where);
}

void block_complete() {
    if (!m.at_block || m.at_block + m.returned != m.count) return;
    const Thread *first = nullptr;
    for (unsigned i = 0; i < m.count; ++i) {
        const Thread &t = m.threads[i];
        if (t.state == RETURNED) continue;
        if (first && !together(*first, t)) fail_together("divergent barriers", 0, m.count);
        first = &t;
    }
    for (unsigned i = 0; i < m.count; ++i)
        if (m.threads[i].state == AT_BLOCK) make_ready(i);
    m.at_block = 0;
    races_barrier();
}

/* Runs the operation for `mask` of warp `w` if all of its lanes have come or returned. */
void warp_complete(unsigned w, unsigned mask) {
    const unsigned come = m.waiting[w], lanes = mask & come;
    if (mask & ~(come | m.gone[w]) || !lanes) return;
    void *part[WARP] = {};
    const Thread *first = nullptr;
    for (unsigned i = 0; i < WARP; ++i) {
        if (!(lanes >> i & 1)) continue;
        const Thread &t = m.threads[w * WARP + i];
        if (t.mask != mask) return; /* it may still come, after what it waits at now */
        const unsigned end = w * WARP + WARP;
        if (first && !together(*first, t)) fail_together("a warp divided", w * WARP, end < m.count ? end : m.count);
        first = &t, part[i] = t.part;
    }
    if (first->kind & WHOLE && lanes != ~0u)
        fail(cudaErrorLaunchFailure, "%s by lanes 0x%08x of warp %u: all 32 have to take part", first->what, lanes, w);
    first->run(part, lanes);
    if (first->kind & ORDERS) races_warp(w * WARP, lanes);
    m.waiting[w] &= ~lanes;
    for (unsigned i = 0; i < WARP; ++i)
        if (lanes >> i & 1) make_ready(w * WARP + i);
}

void enter() {
    arrived(m.threads[m.now].fibre, m.host);
    m.body(m.arguments);
    const unsigned w = m.now / WARP;
    m.threads[m.now].state = RETURNED;
    ++m.returned;
    m.gone[w] |= 1u << m.now % WARP;
    for (unsigned i = 0; i < WARP; ++i)
        if (m.waiting[w] >> i & 1) warp_complete(w, m.threads[w * WARP + i].mask);
    block_complete();
    go(pick(), true);
    abort();
}

void run_block() {
    for (const Range &r : m.shared) fill(const_cast<char *>(r.first), r.size());
    async_block();
    races_block();
    m.at_block = m.returned = m.ready_count = 0;
    for (unsigned w = 0; w * WARP < m.count; ++w) {
        m.waiting[w] = 0;
        m.gone[w] = m.count - w * WARP < WARP ? ~0u << (m.count - w * WARP) : 0; /* lanes that there are not */
    }
    for (unsigned i = 0; i < m.count; ++i) {
        Thread &t = m.threads[i];
        prepare(t.fibre, enter, i % 16 * 320); /* so that the stacks do not all share the same cache sets */
        make_ready(i);
    }
    go(pick());
    if (m.failed == cudaSuccess && m.returned != m.count) {
        char where[400];
        Text text = {where, where + sizeof where};
        say_where(text, 0, m.count);
        report(cudaErrorLaunchTimeout, "a barrier that not all threads reach: %s", where);
    }
}

bool make_stacks() {
    if (m.stacks) return true;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), each = STACK + page;
    void *p =
        mmap(nullptr, each * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return false;
    m.stacks = static_cast<char *>(p);
    m.threads.resize(MOST_THREADS);
    for (size_t i = 0; i < MOST_THREADS; ++i) {
        mprotect(m.stacks + i * each, page, PROT_NONE); /* an overflow faults */
        m.threads[i].fibre.stack = m.stacks + i * each + page;
        m.threads[i].fibre.size = STACK;
    }
    return true;
}

/* malloc, which is 16-byte aligned, and no more */
char *allocate(size_t bytes) { return static_cast<char *>(malloc(bytes ? bytes : 1)); }

uint64_t common_divisor(uint64_t a, uint64_t b) { return b ? common_divisor(b, a % b) : a; }
} // namespace

uint32_t draw(uint32_t below) {
    m.random ^= m.random << 13, m.random ^= m.random >> 7, m.random ^= m.random << 17; /* xorshift64 */
    return static_cast<uint32_t>((m.random >> 32) * below >> 32);
}

void fail(cudaError_t error, const char *format, ...) {
    va_list list;
    va_start(list, format);
    report(error, format, list);
    va_end(list);
    go(NONE, true);
    abort(); /* nobody comes back to a failed thread */
}

unsigned current() { return m.now; }
unsigned lane() { return m.now % WARP; }
void *dynamic_shared() { return const_cast<char *>(m.shared[0].first); }
Range dynamic_range() { return m.shared[0]; }
Range stacks() { return {m.stacks, m.threads.back().fibre.stack + STACK}; }
Range host_frames() { return {m.host_frame, m.host_frame + (64 << 10)}; }

ptrdiff_t shared_offset(const void *p, size_t bytes) {
    const char *at = static_cast<const char *>(p);
    size_t before = 0;
    for (const Range &r : m.shared) {
        if (r.holds(at)) return at + bytes <= r.end ? static_cast<ptrdiff_t>(before) + (at - r.first) : -1;
        before += r.size();
    }
    return -1;
}

void sync_block(Where where) {
    Thread &me = m.threads[m.now];
    me.state = AT_BLOCK, me.where = where, me.what = "__syncthreads";
    ++m.at_block;
    block_complete();
    go(pick());
}

void collective(const char *what, Where where, Kind kind, unsigned mask, Collective run, void *part) {
    Thread &me = m.threads[m.now];
    const unsigned w = m.now / WARP, mine = 1u << m.now % WARP;
    if (!(mask & mine))
        fail(cudaErrorLaunchFailure, "thread %u calls %s with mask 0x%08x, which leaves it out", m.now, what, mask);
    me.state = AT_WARP, me.where = where, me.what = what, me.mask = mask, me.kind = kind, me.run = run, me.part = part;
    m.waiting[w] |= mine;
    warp_complete(w, mask);
    go(pick());
}

void run(const char *name, const void *kernel, dim3 grid, unsigned threads, size_t shared_bytes, void (*body)(void *),
         void *arguments) {
    std::lock_guard<std::mutex> lock(m.one_launch);
    m.name = name, m.kernel = kernel, m.failed = cudaSuccess, blockIdx = dim3(0, 0, 0);
    if (!threads || threads > MOST_THREADS || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535 || shared_bytes > device.shared)
        return report(cudaErrorInvalidConfiguration,
                      "a launch of (%u, %u, %u) blocks of %u threads and %zu bytes of shared memory; at most "
                      "(2147483647, 65535, 65535), %u and %u", grid.x, grid.y, grid.z, threads, shared_bytes,
                      MOST_THREADS, device.shared);
    if (!make_stacks()) return report(cudaErrorLaunchFailure, "no memory for the stacks of %u threads", MOST_THREADS);
    m.host = Fibre();
    m.host_frame = static_cast<const char *>(__builtin_frame_address(0));
    m.body = body, m.arguments = arguments, m.count = threads, gridDim = grid, blockDim = dim3(threads);
    /* of exactly this size, so that AddressSanitizer sees its end */
    std::unique_ptr<char, void (*)(void *)> shared(allocate(shared_bytes), free);
    static std::unordered_map<const void *, std::vector<Range>> known;
    auto found = known.find(kernel);
    if (found == known.end()) found = known.emplace(kernel, shared_of(kernel)).first;
    m.shared.assign(1, {shared.get(), shared.get() + shared_bytes});
    m.shared.insert(m.shared.end(), found->second.begin(), found->second.end());
    size_t all_shared = 0;
    for (const Range &r : m.shared) all_shared += r.size();
    seed_random(m.seed++);
    races_launch(all_shared);
    /* every block once, in an order drawn from the seed */
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    uint64_t step = 1 + draw(0xffffffffu) % blocks, block = draw(0xffffffffu) % blocks;
    while (common_divisor(step, blocks) != 1) ++step;
    for (uint64_t i = 0; i < blocks && m.failed == cudaSuccess; ++i, block = (block + step) % blocks) {
        blockIdx = dim3(static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                        static_cast<unsigned>(block / grid.x / grid.y));
        run_block();
    }
#if defined(PK_SIMT_ASAN)
    if (m.failed != cudaSuccess) /* frames that nobody left */
        for (unsigned i = 0; i < threads; ++i) __asan_unpoison_memory_region(m.threads[i].fibre.stack, STACK);
#endif
}
} // namespace simt

cudaError_t cudaGetLastError() {
    const cudaError_t error = simt::last_error;
    simt::last_error = cudaSuccess;
    return error;
}
const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define PK_SIMT_NAME(name)                                                                                             \
    case name: return #name;
        PK_SIMT_NAME(cudaSuccess)
        PK_SIMT_NAME(cudaErrorInvalidValue)
        PK_SIMT_NAME(cudaErrorInvalidConfiguration)
        PK_SIMT_NAME(cudaErrorNoDevice)
        PK_SIMT_NAME(cudaErrorIllegalAddress)
        PK_SIMT_NAME(cudaErrorLaunchTimeout)
        PK_SIMT_NAME(cudaErrorMisalignedAddress)
        PK_SIMT_NAME(cudaErrorLaunchFailure)
#undef PK_SIMT_NAME
    }
    return "an unknown error";
}
const char *cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorNoDevice || error == cudaErrorInvalidValue) return "the host stand-in has device 0 alone";
    return error == cudaSuccess ? "no error" : simt::last_text;
}

/* Another GPU from now on: 80, 89, 90 ... and its number of multiprocessors. At first an sm_89, which like sm_86 and
 * sm_120 has the least shared memory of all. */
extern "C" PK_EXPORT void pk_simt_set_device(int capability, int processors) {
    const bool least = (capability >= 86 && capability < 90) || capability >= 120;
    simt::device = {capability / 10, capability % 10, processors, (least ? 99u : capability < 90 ? 163u : 227u) << 10};
}
/* The order of threads and blocks from now on: another seed, another order; the same one, the same order. */
extern "C" PK_EXPORT void pk_simt_set_seed(uint64_t seed) { simt::m.seed = seed << 32; }
/* The kind of this build: "plain", "races" or "asan". */
extern "C" PK_EXPORT const char *pk_simt_build(void) {
#if defined(PK_SIMT_RACES)
    return "races";
#elif defined(PK_SIMT_ASAN)
    return "asan";
#else
    return "plain";
#endif
}
