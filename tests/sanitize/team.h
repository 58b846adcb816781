/* What the programs here share: options of the sanitizers, and a stand-in for the OpenMP runtime, whose GOMP_parallel
 * csrc/cpu/parallel.cpp finds in the program that loads the library.
 *
 * A team of std::threads for each parallel region, all of which the sanitizers understand: of libgomp, which is not
 * instrumented, ThreadSanitizer sees neither that a team waits for its threads nor who started them. */
#pragma once
#include <atomic>
#include <thread>
#include <vector>

// A stack of its own for each function, for uses after a return, is misaligned for AVX-512 in GCC's builds (its bug
// 110027).
extern "C" __attribute__((visibility("default"), used)) inline const char *__asan_default_options() {
    return "detect_stack_use_after_return=0";
}
extern "C" __attribute__((visibility("default"), used)) inline const char *__ubsan_default_options() {
    return "halt_on_error=1:print_stacktrace=1";
}
extern "C" __attribute__((visibility("default"), used)) inline const char *__tsan_default_options() {
    return "halt_on_error=1";
}

inline thread_local const void *team_task = nullptr; // what the thread is at, for messages; a team takes it over

extern "C" __attribute__((visibility("default"), used)) inline void GOMP_parallel(void (*fn)(void *), void *data,
                                                                                 unsigned threads, unsigned) {
    // All begin together, so that one that starts late does not find everything done. Relaxed: nothing is ordered by it.
    std::atomic<unsigned> here{0};
    const void *task = team_task;
    auto member = [&] {
        team_task = task;
        here.fetch_add(1, std::memory_order_relaxed);
        while (here.load(std::memory_order_relaxed) < threads) std::this_thread::yield();
        fn(data);
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(member);
    member();
    for (auto &other : others) other.join();
}
