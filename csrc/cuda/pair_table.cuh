/* The table that the matrix kernels decode by, and where they share memory with it. A byte of two codes picks a pair of
 * 16-bit values, one word of a fragment of mma.sync. The table has a copy for each lane, so no two meet in a bank;
 * an entry is 256 bytes from the next, so one byte permute makes the address. It fills the first half of each
 * 256-byte line of shared memory; packed bytes on their way in fill the other halves. */
#pragma once
#include "ptx.cuh"
#include "values.cuh"

namespace mma {
constexpr int THREADS = 256;
constexpr int LINES = 256, LINE = 256, HOLE = 128;

template <typename To> __device__ __forceinline__ To &at(char *memory, int offset) {
    return *reinterpret_cast<To *>(memory + offset);
}

/* A thread writes one line. The high nibble's value comes first. */
template <typename T> __device__ __forceinline__ void fill_table(char *shared, const PkTable &values) {
    static_assert(THREADS == LINES);
    const int line = static_cast<int>(threadIdx.x);
    const uint32_t w = pk_pack<T>(values.value[line / 16], values.value[line % 16]);
    /* lanes start apart */
    for (int i = 0; i < 8; ++i) at<uint4>(shared, line * LINE + (i + line) % 8 * 16) = {w, w, w, w};
}

/* The entry of a byte of codes. copy: of the thread's column in a line of the table. */
__device__ __forceinline__ uint32_t look_up(char *shared, uint32_t word, int byte, uint32_t copy) {
    return at<uint32_t>(shared, pk_prmt(word, copy, 0x5504 | byte << 4)); /* byte * 256 + copy */
}
} // namespace mma
