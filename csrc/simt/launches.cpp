/* Which block of which launch runs next. Blocks of a launch run one after the other, in an order drawn from the seed.
 *
 * A launch runs when the next one is queued, or somebody asks for errors: until then nobody knows what comes after it.
 * If that may begin sooner (`after`), some of its first blocks run up to where they wait while the launch before it has
 * run a few of its blocks, or none, so that they meet memory as it was; then that one ends, and they go on. Not in the
 * build for races, which finds such reads whatever runs first (races.cpp). */
#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "../pk_abi.h"
#include "blocks.h"

namespace simt {
Device device = {8, 9, 108, 99 << 10};
namespace {
constexpr unsigned EARLY = 3; /* blocks that begin early, at most */
#if defined(PK_SIMT_RACES)
constexpr bool AT_ONCE = true;
#else
constexpr bool AT_ONCE = false;
#endif

struct Running : Launch {
    std::unique_ptr<char, void (*)(void *)> dynamic{nullptr, free};
    std::vector<Range> shared_memory;
    uint64_t blocks = 0, step = 1, next = 0, left = 0;
    std::vector<std::unique_ptr<Block>> early; /* those that wait */
    explicit Running(const Launch &launch) : Launch(launch) {}
    Running(const Running &) = delete;
    ~Running() { drop(arguments); }
};

std::mutex one_launch;
std::unique_ptr<Running> queued;
std::vector<std::unique_ptr<Block>> spare;
uint64_t seed = 0;
int64_t launches = 0, early_launches = 0;
bool count_only = false;

void seed_random(uint64_t value) {
    value += 0x9e3779b97f4a7c15u; /* splitmix64 */
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
    value = (value ^ value >> 27) * 0x94d049bb133111ebu;
    m.random = (value ^ value >> 31) | 1;
}

/* malloc, which is 16-byte aligned, and no more */
char *allocate(size_t bytes) { return static_cast<char *>(malloc(bytes ? bytes : 1)); }

uint64_t common_divisor(uint64_t a, uint64_t b) { return b ? common_divisor(b, a % b) : a; }

/* After a failure: its threads are in frames that nobody left. */
void abandon([[maybe_unused]] Block &block) {
#if defined(PK_SIMT_ASAN)
    for (Thread &t : block.threads) __asan_unpoison_memory_region(t.fibre.stack, t.fibre.size);
#endif
}

/* The machine runs this one from now on. */
void use(const Running &r, bool previous_runs) {
    m.launch = &r, m.previous_runs = previous_runs, m.count = r.threads;
    m.shared_memory = r.shared_memory;
    gridDim = r.grid, blockDim = dim3(r.threads), blockIdx = dim3(0, 0, 0);
    m.host = Fibre();
}

/* False where it cannot be launched. */
bool prepare(Running &r) {
    use(r, false);
    if (!r.threads || r.threads > MOST_THREADS || !r.grid.x || !r.grid.y || !r.grid.z || r.grid.x > 0x7fffffffu ||
        r.grid.y > 65535 || r.grid.z > 65535 || r.shared_bytes > device.shared) {
        report(cudaErrorInvalidConfiguration,
               "a launch of (%u, %u, %u) blocks of %u threads and %zu bytes of shared memory; at most "
               "(2147483647, 65535, 65535), %u and %u", r.grid.x, r.grid.y, r.grid.z, r.threads, r.shared_bytes,
               MOST_THREADS, device.shared);
        return false;
    }
    if (!make_stacks(m)) {
        report(cudaErrorLaunchFailure, "no memory for the stacks of %u threads", MOST_THREADS);
        return false;
    }
    /* of exactly this size, so that AddressSanitizer sees its end */
    r.dynamic.reset(allocate(r.shared_bytes));
    static std::unordered_map<const void *, std::vector<Range>> known;
    auto found = known.find(r.kernel);
    if (found == known.end()) found = known.emplace(r.kernel, shared_of(r.kernel)).first;
    r.shared_memory.assign(1, {r.dynamic.get(), r.dynamic.get() + r.shared_bytes});
    r.shared_memory.insert(r.shared_memory.end(), found->second.begin(), found->second.end());
    seed_random(seed++);
    /* every block once, in an order drawn from the seed */
    r.blocks = r.left = uint64_t(r.grid.x) * r.grid.y * r.grid.z;
    r.step = 1 + draw(0xffffffffu) % r.blocks, r.next = draw(0xffffffffu) % r.blocks;
    while (common_divisor(r.step, r.blocks) != 1) ++r.step;
    return true;
}

/* The next block of the launch in use; true: it waits for the launch before. */
bool run_next(Running &r) {
    const uint64_t block = r.next;
    r.next = (r.next + r.step) % r.blocks, --r.left;
    return run_block({static_cast<unsigned>(block % r.grid.x), static_cast<unsigned>(block / r.grid.x % r.grid.y),
                      static_cast<unsigned>(block / r.grid.x / r.grid.y)});
}

void begin_early(Running &r) {
    use(r, true);
    bool waited = false;
    for (uint64_t n = std::min<uint64_t>(1 + draw(EARLY), r.left); n && m.failed == cudaSuccess; --n) {
        if (!run_next(r)) continue;
        if (spare.empty()) spare.emplace_back(new Block);
        r.early.push_back(std::move(spare.back()));
        spare.pop_back();
        put_aside(*r.early.back());
        waited = true;
        if (!make_stacks(m)) report(cudaErrorLaunchFailure, "no memory for the stacks of %u threads", MOST_THREADS);
    }
    early_launches += waited;
}

/* Up to `most` blocks that have not begun. */
void run_some(Running &r, uint64_t most) {
    use(r, false);
    for (; most && r.left && m.failed == cudaSuccess; --most) run_next(r);
}

void end(std::unique_ptr<Running> r) {
    if (!r) return;
    size_t all_shared = 0;
    for (const Range &range : r->shared_memory) all_shared += range.size();
    races_launch(all_shared, r->after);
    use(*r, false);
    for (auto &block : r->early) {
        if (m.failed == cudaSuccess) {
            take_up(*block);
            go_on();
        } else {
            abandon(*block);
        }
        spare.push_back(std::move(block));
    }
    run_some(*r, ~uint64_t(0));
    if (m.failed != cudaSuccess) abandon(m);
}
} // namespace

void count_launch() { ++launches; }

void queue(Launch launch) {
    std::lock_guard<std::mutex> lock(one_launch);
    launch.after = launch.after && device.major >= 9;
    std::unique_ptr<Running> next(new Running(launch));
    count_launch();
    if (count_only) return;
    m.failed = cudaSuccess;
    if (!prepare(*next)) return;
    if (queued && next->after) {
        run_some(*queued, draw(3) * queued->left / 4);
        if (m.failed == cudaSuccess) begin_early(*next);
    }
    end(std::move(queued));
    if (m.failed == cudaSuccess) queued = std::move(next);
    if (AT_ONCE) end(std::move(queued));
}

void flush() {
    std::lock_guard<std::mutex> lock(one_launch);
    m.failed = cudaSuccess;
    end(std::move(queued));
}
} // namespace simt

cudaError_t cudaGetLastError() {
    simt::flush(); /* a GPU's does not wait; here a caller is told of all that it queued */
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
extern "C" PK_EXPORT void pk_simt_set_seed(uint64_t seed) { simt::seed = seed << 32; }
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
/* Launches so far, and memsets, which are nodes of a graph as well; early: those of which blocks ran before the launch
 * before had ended. */
extern "C" PK_EXPORT int64_t pk_simt_launches(int early) { return early ? simt::early_launches : simt::launches; }
/* From now on launches are counted and not run: for sizes that would take too long. */
extern "C" PK_EXPORT void pk_simt_count_only(int on) { simt::count_only = on != 0; }
