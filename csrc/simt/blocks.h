/* Blocks of the machine: what machine.cpp, where a block runs, and launches.cpp, which says whose turn it is, know. */
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "fibre.h"
#include "machine.h"

namespace simt {
enum State : uint8_t { READY, AT_BLOCK, AT_WARP, AT_PREVIOUS, RETURNED };

struct Thread {
    Fibre fibre;
    State state;
    bool waited; /* for the launch before */
    Where where{"", 0}; /* what it waits at */
    const char *what;
    unsigned mask;
    Kind kind;
    Collective run;
    void *part;
};

/* Threads that run, or were interrupted where they wait for the launch before. */
struct Block {
    std::vector<Thread> threads; /* with stacks of their own, used again */
    char *stacks = nullptr;
    unsigned at_block = 0, at_previous = 0, returned = 0, ready_count = 0;
    unsigned ready[MOST_THREADS];
    unsigned waiting[MOST_THREADS / WARP], gone[MOST_THREADS / WARP]; /* lanes of each warp */
    dim3 index;
    std::string shared; /* what was in its shared memory when it was interrupted */
    std::shared_ptr<void> copies; /* cp.async under way then */
};

struct Machine : Block {
    Fibre host;
    unsigned count = 0, now = NONE;
    const Launch *launch = nullptr; /* that runs */
    bool previous_runs = false;     /* the one before it has not ended */
    std::vector<Range> shared_memory; /* dynamic, then static, of its kernel */
    uint64_t random = 1;
    cudaError_t failed = cudaSuccess;
};
extern Machine m;
extern thread_local cudaError_t last_error;
extern thread_local char last_text[640];

/* Notes an error of the launch that runs (printf style). */
void report(cudaError_t error, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool make_stacks(Block &block);
/* These return when the block of m has ended, failed or, true, waits for the launch before. */
bool run_block(dim3 index);
bool go_on();
/* The block of m to and from where it lies while another one runs. */
void put_aside(Block &block);
void take_up(Block &block);
} // namespace simt
