/* Several projections of one x in one launch. Their blocks stand one projection after the other along x of the grid;
 * a kernel has an array of what differs, and a block picks its own entry. */
#pragma once
#include "common.cuh"

constexpr int PK_STACK = 4; /* projections in a launch; PK_CUDA_STACK of pk_abi.h */
static_assert(PK_STACK == PK_CUDA_STACK);

struct PkBlocks {
    unsigned first[PK_STACK]; /* where each begins; beyond every grid for those that there are not */
    /* The projection of a block. One without blocks begins where the next one does, and is passed over. */
    __device__ __forceinline__ int of(unsigned block) const {
        int i = 0;
#pragma unroll
        for (int k = 1; k < PK_STACK; ++k) i += block >= first[k];
        return i;
    }
};

/* Fills in a PkBlocks. */
struct PkBlockCounter {
    PkBlocks blocks;
    int64_t total = 0;
    int count = 0;
    PkBlockCounter() {
        for (unsigned &first : blocks.first) first = ~0u;
    }
    void add(int64_t more) { blocks.first[count++] = static_cast<unsigned>(total), total += more; }
};
