/* How many blocks share the sums of one tile of a matrix product, and who adds their parts: the choice with the fewest
 * clocks of a model, of which bench/static/splits.py has the same formulas for the static report. */
#pragma once
#include "common.cuh"

inline int64_t pk_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int pk_device_attribute(cudaDeviceAttr which, int otherwise) {
    int device = 0, value = otherwise;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) {
        cudaGetLastError(); /* no device: a launch will say so */
        return otherwise;
    }
    return value;
}

namespace mma {
/* A block can have 99 KB of shared memory on sm_86 to 89 and from sm_120 on, 163 KB or more on the others. Those have a
 * quarter of the others' tensor cores and memory bandwidth an SM, too. */
__host__ __device__ constexpr bool small_memory(int arch) { return (arch >= 86 && arch < 90) || arch >= 120; }
} // namespace mma
inline bool pk_small_gpu() {
    return mma::small_memory(10 * pk_device_attribute(cudaDevAttrComputeCapabilityMajor, 8) +
                             pk_device_attribute(cudaDevAttrComputeCapabilityMinor, 0));
}

/* The numbers of the model. By the makers': of memory an SM's share is 14 bytes a clock (small GPUs: 3.5), of
 * multiply-adds by mma.sync 1024 (256). Estimates that no clock has seen: from and to L2 an SM moves 32 bytes a clock
 * (its port takes 64; one block alone has not enough loads under way, and for all SMs at once L2 has no more); parts
 * are handed over (written, fence, atomic, first read) in 1500 clocks; a kernel that waits for another starts 3500
 * clocks, 2 us, behind it. */
constexpr int64_t PK_L2_BYTES = 32, PK_HAND_OVER = 1500, PK_NEXT_KERNEL = 3500;

/* Clocks of a step over BK of k in a tile: its codes from memory or its products, whichever take longer. */
constexpr int64_t pk_step_clocks(int64_t BM, int64_t BN, int64_t BK, bool small) {
    const int64_t codes = BN * BK / (small ? 7 : 28), products = BM * BN * BK / (small ? 256 : 1024);
    return codes > products ? codes : products;
}

/* The sums of a product. tiles: of its result. steps: of each sum, `step` clocks each; a block starts and ends in as
 * many as 3 of them. part: bytes of a tile's sums in float32. */
struct PkSums {
    int64_t tiles, steps, step, part;
};
/* parts: of each sum. apart: a kernel of its own adds them, on all SMs; else the last block of a tile to arrive. */
struct PkSplit {
    int parts;
    bool apart;
};

/* Clocks of the product, and of adding, on so many SMs, a block on each. A part is written by the block that has it,
 * and read by the one that adds. */
inline int64_t pk_split_clocks(const PkSums &s, PkSplit split, int64_t processors) {
    const int64_t n = split.parts, part = pk_ceil_div(s.part, PK_L2_BYTES);
    const int64_t rounds = pk_ceil_div(s.tiles * n, processors);
    const int64_t product = rounds * (pk_ceil_div(s.steps, n) + 3) * s.step, written = product + rounds * part;
    if (split.apart) return written + PK_NEXT_KERNEL + pk_ceil_div(s.tiles * n * part, processors);
    return n == 1 ? product : written + PK_HAND_OVER + pk_ceil_div(s.tiles, processors) * n * part;
}

/* The adder of parts: what takes fewer clocks, the last block to arrive, or a second kernel, there in any case. */
enum class PkAdds { EITHER, LAST, APART };

/* The split of the fewest clocks; of two that are equal, the one of fewer parts. */
inline PkSplit pk_splits(const PkSums &s, PkAdds who) {
    const int64_t processors = pk_device_attribute(cudaDevAttrMultiProcessorCount, 108);
    PkSplit best = {1, who == PkAdds::APART};
    int64_t fewest = pk_split_clocks(s, best, processors);
    for (int n = 2; n <= 16 && s.steps >= 4 * n; ++n)
        for (const PkSplit split : {PkSplit{n, false}, PkSplit{n, true}}) {
            if (who == (split.apart ? PkAdds::LAST : PkAdds::APART)) continue;
            const int64_t clocks = pk_split_clocks(s, split, processors);
            if (clocks < fewest) fewest = clocks, best = split;
        }
    return best;
}
