/* How many blocks share the sums of one tile of a matrix product. */
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

/* Parts of the sum over `steps` of each of `tiles`, so that the last round of blocks, one on an SM, is short. start:
 * steps that a block takes to start and end. */
inline int pk_splits(int64_t tiles, int64_t steps, int64_t start) {
    const int64_t slots = pk_device_attribute(cudaDevAttrMultiProcessorCount, 108);
    int64_t fewest = 0;
    int best = 1;
    for (int64_t split = 1; split <= 16 && (split == 1 || steps >= 4 * split); ++split) {
        const int64_t adding = split > 1 ? 2 + split / 4 : 0;
        const int64_t cost = pk_ceil_div(tiles * split, slots) * (pk_ceil_div(steps, split) + start) + adding;
        if (split == 1 || cost < fewest) fewest = cost, best = static_cast<int>(split);
    }
    return best;
}
