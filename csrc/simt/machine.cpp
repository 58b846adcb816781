/* The machine of simt.h: who runs next in a block, what a barrier and a warp's operation wait for, and what is said
 * when they fail. launches.cpp says which block runs next. */
#include "blocks.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(PK_SIMT_SWITCH)
PK_SIMT_SWITCH
#endif

dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace simt {
constexpr size_t STACK = 256 << 10;
Machine m;
thread_local cudaError_t last_error = cudaSuccess;
thread_local char last_text[640] = "";
namespace {
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
        else if (t.state == AT_BLOCK || t.state == AT_PREVIOUS)
            text.add(" wait at %s (%s:%d)", t.what, file, t.where.line);
        else
            text.add(" wait at %s (%s:%d, mask 0x%08x)", t.what, file, t.where.line, t.mask);
    }
}

void report_list(cudaError_t error, const char *format, va_list list) {
    char what[400], kernel[160] = "";
    vsnprintf(what, sizeof what, format, list);
    describe(m.launch->kernel, kernel, sizeof kernel);
    snprintf(last_text, sizeof last_text, "kernel %s, block (%u, %u, %u): %s", kernel[0] ? kernel : m.launch->name,
             blockIdx.x, blockIdx.y, blockIdx.z, what);
    m.failed = last_error = error;
}
} // namespace

void report(cudaError_t error, const char *format, ...) {
    va_list list;
    va_start(list, format);
    report_list(error, format, list);
    va_end(list);
}

namespace {

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
    m.launch->body(m.launch->arguments);
    if (m.launch->after && !m.threads[m.now].waited)
        fail(cudaErrorLaunchFailure,
             "thread %u returns and has not waited for the launch before: the next one may begin before that has ended",
             m.now);
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

/* To the host, when nobody can run. */
bool run_on() {
    go(pick());
    if (m.failed != cudaSuccess || m.returned == m.count) return false;
    if (m.at_previous) return true;
    char where[400];
    Text text = {where, where + sizeof where};
    say_where(text, 0, m.count);
    report(cudaErrorLaunchTimeout, "a barrier that not all threads reach: %s", where);
    return false;
}

__attribute__((no_sanitize("address"))) void copy_out(std::string &to) {
    to.clear();
    for (const Range &r : m.shared_memory)
        for (const char *p = r.first; p < r.end; ++p) to += *static_cast<const char volatile *>(p);
}
__attribute__((no_sanitize("address"))) void copy_back(const std::string &from) {
    size_t i = 0;
    for (const Range &r : m.shared_memory)
        for (const char *p = r.first; p < r.end; ++p)
            *static_cast<char volatile *>(const_cast<char *>(p)) = from[i++];
}
} // namespace

bool run_block(dim3 index) {
    blockIdx = m.index = index;
    for (const Range &r : m.shared_memory) fill(const_cast<char *>(r.first), r.size());
    async_block();
    races_block();
    m.at_block = m.at_previous = m.returned = m.ready_count = 0;
    for (unsigned w = 0; w * WARP < m.count; ++w) {
        m.waiting[w] = 0;
        m.gone[w] = m.count - w * WARP < WARP ? ~0u << (m.count - w * WARP) : 0; /* lanes that there are not */
    }
    for (unsigned i = 0; i < m.count; ++i) {
        Thread &t = m.threads[i];
        prepare(t.fibre, enter, i % 16 * 320); /* so that the stacks do not all share the same cache sets */
        t.waited = false;
        make_ready(i);
    }
    return run_on();
}

bool go_on() {
    for (unsigned i = 0; i < m.count; ++i)
        if (m.threads[i].state == AT_PREVIOUS) make_ready(i);
    m.at_previous = 0;
    return run_on();
}

void put_aside(Block &block) {
    copy_out(m.shared);
    m.copies = async_put_aside();
    std::swap<Block>(m, block);
}

void take_up(Block &block) {
    std::swap<Block>(m, block);
    async_take_up(m.copies);
    copy_back(m.shared);
    blockIdx = m.index;
}

bool make_stacks(Block &block) {
    if (block.stacks) return true;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), each = STACK + page;
    void *p =
        mmap(nullptr, each * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return false;
    block.stacks = static_cast<char *>(p);
    block.threads.resize(MOST_THREADS);
    for (size_t i = 0; i < MOST_THREADS; ++i) {
        mprotect(block.stacks + i * each, page, PROT_NONE); /* an overflow faults */
        block.threads[i].fibre.stack = block.stacks + i * each + page;
        block.threads[i].fibre.size = STACK;
    }
    return true;
}

uint32_t draw(uint32_t below) {
    m.random ^= m.random << 13, m.random ^= m.random >> 7, m.random ^= m.random << 17; /* xorshift64 */
    return static_cast<uint32_t>((m.random >> 32) * below >> 32);
}

void fail(cudaError_t error, const char *format, ...) {
    va_list list;
    va_start(list, format);
    report_list(error, format, list);
    va_end(list);
    go(NONE, true);
    abort(); /* nobody comes back to a failed thread */
}

unsigned current() { return m.now; }
unsigned lane() { return m.now % WARP; }
void *dynamic_shared() { return const_cast<char *>(m.shared_memory[0].first); }
Range dynamic_range() { return m.shared_memory[0]; }
Range stacks() { return {m.stacks, m.threads.back().fibre.stack + STACK}; }
Range arguments() {
    const char *first = static_cast<const char *>(m.launch->arguments);
    return {first, first + m.launch->argument_bytes};
}

ptrdiff_t shared_offset(const void *p, size_t bytes) {
    const char *at = static_cast<const char *>(p);
    size_t before = 0;
    for (const Range &r : m.shared_memory) {
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

void wait_for_previous(Where where) {
    Thread &me = m.threads[m.now];
    if (m.previous_runs) {
        me.state = AT_PREVIOUS, me.where = where, me.what = "griddepcontrol.wait";
        ++m.at_previous;
        go(pick());
    }
    m.threads[m.now].waited = true;
    races_waited();
}

void release_next() {
    if (m.launch->after && !m.threads[m.now].waited)
        fail(cudaErrorLaunchFailure,
             "thread %u lets the next launch begin and has not waited for the one before, which that one may then meet",
             m.now);
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

} // namespace simt
