/* Threads and workspace.
 *
 * The process must hold one OpenMP runtime: torch's. torch's wheels may bundle it under a hashed file name, so a
 * DT_NEEDED libgomp.so.1 of ours could load a second one, with a second pool of threads spinning against the first. So
 * this library is compiled and linked without OpenMP, and calls GOMP_parallel of the runtime that is already loaded
 * (libgomp has it, and libomp / libiomp5 export it too). Without one the work runs on the calling thread. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#if !defined(_WIN32)
#include <dlfcn.h>
#endif
#if defined(__linux__)
#include <link.h>
#endif
#if defined(__has_feature)
#define PK_HAS_FEATURE(name) __has_feature(name)
#else
#define PK_HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || PK_HAS_FEATURE(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define PK_ASAN
#endif

namespace {
typedef void (*GompParallel)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
GompParallel gomp_parallel = nullptr;

#if defined(__linux__)
// Loaded, but not in the global scope (RTLD_LOCAL): find it by name among the loaded objects.
int visit(struct dl_phdr_info *info, size_t, void *out) {
    const char *path = info->dlpi_name;
    const char *name = path ? strrchr(path, '/') : nullptr;
    name = name ? name + 1 : path;
    if (!name || (strncmp(name, "libgomp", 7) && strncmp(name, "libomp", 6) && strncmp(name, "libiomp", 7))) return 0;
    void *handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return 0;
    void *symbol = dlsym(handle, "GOMP_parallel");
    dlclose(handle); // drops only the reference that RTLD_NOLOAD added
    if (!symbol) return 0;
    *static_cast<void **>(out) = symbol;
    return 1;
}
#endif

GompParallel find_runtime() {
    GompParallel found = __atomic_load_n(&gomp_parallel, __ATOMIC_ACQUIRE);
    if (found) return found;
#if !defined(_WIN32)
    void *symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#if defined(__linux__)
    if (!symbol) dl_iterate_phdr(visit, &symbol);
#endif
    memcpy(&found, &symbol, sizeof found);
    __atomic_store_n(&gomp_parallel, found, __ATOMIC_RELEASE);
#endif
    return found;
}

// Each thread starts with a run of tasks of its own, so that the memory which one task prefetches for the next is
// wanted by the same core; then it helps with the runs of the others: right for any team size (a nested region may get
// one thread), and a thread that the machine slows down does less. It takes the run it took the last time if it can:
// workspaces that it wrote then are in its core's cache, while lines that another core has written are ten times as far
// away.
enum { RUNS = 64 };
struct Job {
    int64_t runs;
    void (*fn)(void *, int64_t);
    void *ctx;
    struct alignas(64) {
        int64_t next, end;
        bool taken;
    } run[RUNS];
};
thread_local int64_t seat = 0; // the run that this thread began with

int64_t run_of(Job *job) {
    for (int64_t i = 0; i < job->runs; ++i) {
        int64_t mine = (seat + i) % job->runs;
        if (!__atomic_exchange_n(&job->run[mine].taken, true, __ATOMIC_RELAXED)) return seat = mine;
    }
    return seat % job->runs; // more threads than runs
}

void work(void *p) {
    Job *job = static_cast<Job *>(p);
    int64_t mine = run_of(job);
    for (int64_t i = 0; i < job->runs; ++i) {
        auto &run = job->run[(mine + i) % job->runs];
        for (int64_t task; (task = __atomic_fetch_add(&run.next, 1, __ATOMIC_RELAXED)) < run.end;)
            job->fn(job->ctx, task);
    }
}

struct Scratch {
    void *block[PK_SCRATCH_SLOTS];
    size_t bytes[PK_SCRATCH_SLOTS];
    ~Scratch() {
        for (void *p : block) free(p);
    }
};
thread_local Scratch scratch = {};
} // namespace

void pk_parallel(int64_t tasks, int64_t threads, void (*fn)(void *, int64_t), void *ctx) {
    if (threads > tasks) threads = tasks;
    GompParallel run = threads > 1 ? find_runtime() : nullptr;
    if (!run) {
        for (int64_t task = 0; task < tasks; ++task) fn(ctx, task);
        return;
    }
    Job job;
    job.runs = threads < RUNS ? threads : int64_t(RUNS), job.fn = fn, job.ctx = ctx;
    for (int64_t i = 0; i < job.runs; ++i)
        job.run[i].next = tasks * i / job.runs, job.run[i].end = tasks * (i + 1) / job.runs, job.run[i].taken = false;
    run(work, &job, static_cast<unsigned>(threads), 0);
}

void *pk_scratch(int slot, size_t bytes) {
    Scratch &mine = scratch;
    if (mine.bytes[slot] < bytes || !mine.block[slot]) {
        free(mine.block[slot]);
        size_t size = (bytes + 4095) & ~size_t(4095);
        if (!size) size = 4096;
        void *p = nullptr;
        if (size < bytes || posix_memalign(&p, 64, size)) p = nullptr;
        mine.block[slot] = p;
        mine.bytes[slot] = p ? size : 0;
    }
#if defined(PK_ASAN) // it ends where what was asked for ends, and nothing is left in it
    if (mine.block[slot]) {
        char *block = static_cast<char *>(mine.block[slot]);
        ASAN_UNPOISON_MEMORY_REGION(block, mine.bytes[slot]);
        memset(block, 0xff, bytes);
        ASAN_POISON_MEMORY_REGION(block + bytes, mine.bytes[slot] - bytes);
    }
#endif
    return mine.block[slot];
}

void pk_scratch_trim(int first, int end) {
    for (int slot = first; slot < end; ++slot)
        if (scratch.bytes[slot] > (size_t(16) << 20)) {
            free(scratch.block[slot]);
            scratch.block[slot] = nullptr;
            scratch.bytes[slot] = 0;
        }
}

extern "C" const char *pk_cpu_openmp(void) {
#if !defined(_WIN32)
    GompParallel run = find_runtime();
    void *symbol;
    memcpy(&symbol, &run, sizeof symbol);
    Dl_info info;
    if (symbol && dladdr(symbol, &info) && info.dli_fname) return info.dli_fname;
#endif
    return "";
}
