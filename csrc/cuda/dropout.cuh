/* Dropout from a counter (peft_kernels/philox.py): the same elements on every backend, and no mask in memory. */
#pragma once
#include "common.cuh"

struct PkDropout {
    const int64_t *seed; /* NULL: nothing is dropped */
    uint32_t threshold;  /* a word below it: dropped */
    float keep;          /* what the kept are multiplied by; 1 without dropout */
};
inline PkDropout pk_dropout_of(const pk_lora_args &args) {
    if (!(args.dropout_p > 0) || args.r == 0) return {nullptr, 0, 1.0f};
    const double bound = nearbyint(args.dropout_p * 4294967296.0);
    return {args.seed, static_cast<uint32_t>(bound < 4294967295.0 ? bound : 4294967295.0),
            static_cast<float>(1.0 / (1.0 - args.dropout_p))};
}

/* Philox4x32-10 at counter (low, high, 0, 0): of its four words, bit w is set where word w is not below `threshold`. */
__device__ __forceinline__ uint32_t pk_keep4(uint64_t counter, uint64_t seed, uint32_t threshold) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (c0 >= threshold) | (c1 >= threshold) << 1 | (c2 >= threshold) << 2 | (c3 >= threshold) << 3;
}

/* Bit i: is element e + i of the flattened input kept? For i < COUNT (4 or 8). */
template <int COUNT> __device__ __forceinline__ uint32_t pk_keep(const PkDropout &drop, uint64_t seed, int64_t e) {
    const uint64_t first = static_cast<uint64_t>(e) >> 2;
    uint32_t bits = 0;
#pragma unroll
    for (int q = 0; q < COUNT / 4; ++q) bits |= pk_keep4(first + q, seed, drop.threshold) << (4 * q);
    const unsigned within = static_cast<unsigned>(e) & 3u;
    /* starts in the middle of a group */
    if (within) bits |= pk_keep4(first + COUNT / 4, seed, drop.threshold) << COUNT;
    return bits >> within;
}
__device__ __forceinline__ uint64_t pk_seed(const PkDropout &drop) {
    return drop.seed ? static_cast<uint64_t>(*drop.seed) : 0;
}
