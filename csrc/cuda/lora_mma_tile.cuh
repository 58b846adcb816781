/* The tiles of lora_mma.cu: their memory, and how W, its scales and x come in.
 *
 * A block of threads has a tile of BM rows and BN columns of y. Each of its 8 warps has 32 columns, that is rows of W,
 * and all BM rows of x, so that a weight is decoded once for all of them. y^T = W x^T: W is the left operand, so that a
 * row of W lies along k within a thread. The order of k within 64 is free as long as W and x agree: thread t of 4 takes
 * elements 16 t to 16 t + 15, 8 neighbouring bytes of codes and 32 of x. Codes become fragments without a shuffle, and
 * x comes by 16-byte loads.
 *
 * Pairs of codes are looked up in the table of pair_table.cuh.
 *
 * The scale of a block of the format, one for 64 or more elements of a row of W, multiplies what is cheaper: a thread's
 * sums over 64 elements of k (SUMS: BM multiply-adds for its 64 weights; float32) or its weights (WEIGHTS: an
 * instruction for each pair, whatever BM is; in 16 bits, so that a weight is rounded three times where eager's is
 * once: its code's value, the scale, the product). Blocks of 32, and rows of whole 32 but not 64, have two scales in
 * 64 (HALVES). */
#pragma once
#include "groups.cuh"
#include "lora.cuh"
#include "pair_table.cuh"
#include "scales.cuh"
#include "splits.cuh"

namespace mma {
constexpr int GROUP = 64; /* elements of k that a warp works on between two barriers */

struct Problem {
    const uint8_t *x, *packed;
    PkScales scales;
    const void *b, *bias;
    const float *s, *gain; /* gain: or NULL */
    const float *start;    /* NULL, or [M, N]: what the sums start at, and r is 0 */
    uint16_t *y, *h;       /* h: with a gain, or NULL */
    float4 *partial;   /* split > 1: [tile][part][BM / 4][threads of a K group] */
    unsigned *arrived; /* split > 1: per tile, zero; NULL where another kernel adds the parts; both of all tiles of the
                        * stack */
    PkBeside beside;
    int M, N, K, r, m_tiles, split;
    uint32_t x_row, codes_row; /* bytes */
    uint32_t last_unit;        /* of W; 32 elements */
    int shift;                 /* log2 of the block size in elements, or in 32 of them where the tile is not GENERAL */
    int b_dtype, bias_dtype;
    float scaling, unscale; /* unscale: 1 / what the table is multiplied by */
    PkTable table;
};

struct Stack {
    Problem each[PK_STACK]; /* alike but for W, b, bias, y and what belongs to them */
    PkBlocks blocks;        /* tiles */
};

enum Where { ANY, LARGE, SMALL };
enum Scaling { SUMS, WEIGHTS, HALVES, ELEMENTS };

/* WK: groups of warps that share the columns and split k. WHERE: the architectures that use this tile;
 * PTX of those with little memory has none that is LARGE. ELEMENTS: any K and alignment, by plain loads, the scales
 * looked up where they are used. */
template <int BM_, int WK_, int STAGES_, Where WHERE_, Scaling SCALING_> struct Tile {
    static constexpr int BM = BM_, WK = WK_, STAGES = STAGES_;
    static constexpr Where WHERE = WHERE_;
    static constexpr Scaling SCALING = SCALING_;
    static constexpr bool GENERAL = SCALING == ELEMENTS;
    static constexpr bool WHOLE = SCALING == SUMS || SCALING == WEIGHTS; /* groups of 64 are there, or not */
    /* the loop's values fill all registers: it serves a single projection, whose fields have addresses of their own */
    static constexpr bool FULL = BM > 64;
    static constexpr int BN = 256 / WK, BK = GROUP * WK, COLUMN_THREADS = THREADS / WK;
    using Sums = float[2][BM / 8][4]; /* of 16 rows of W, 8 of x: one product of mma.sync */
    static constexpr int QUARTERS = BM / 4; /* float4 of sums a thread */
    static constexpr int CODES = 64; /* lines of codes a stage */
    static constexpr int X = LINES * LINE, X_STAGE = BM * BK * 2;
    static constexpr int ROUND = STAGES == 2 ? 4 : STAGES; /* steps in a pass of the loop */
    static constexpr int SCALE_CODE = X + STAGES * X_STAGE;
    static constexpr int BYTES = SCALE_CODE + 1024;
    static_assert(BM * (BN + 8) * 2 <= BYTES && (WK == 1 || COLUMN_THREADS * BM * 4 <= BYTES), "the end reuses it");
    static_assert(BYTES <= (WHERE == LARGE ? 163 << 10 : 99 << 10), "what a block can have");
};

struct alignas(8) Words {
    uint32_t x, y;
};

/* Loads of a thread: 2 chunks of 32 codes and BM * WK / 32 chunks of 8 elements of x a stage. Rows past the end read
 * the last one, and their sums are not stored. Past the end of k (`end`) there are zeros. The loop goes round once
 * for all stages, so that each has its place in the code; `step` counts from there. */
template <typename C> struct Loader {
    /* a thread's chunks of x are of its group, or of both, where the addresses of more rows would take registers that
     * are not there */
    static constexpr bool BOTH = C::WK == 2 && C::FULL;
    static constexpr int X_CHUNKS = C::BM * (BOTH ? 1 : C::WK) / 32, X_ROWS = C::BM / X_CHUNKS;
    const uint8_t *codes[2], *x[X_CHUNKS];
    int codes_to, x_to;
    int left, own_left; /* elements of k to the end, from the thread's group; and of x from its chunk, or the second
                         * group */

    __device__ __forceinline__ Loader(const Problem &p, int n0, int m0, int k0, int end) {
        const int tid = threadIdx.x;
        const int row = tid / (2 * C::WK), chunk = tid % (2 * C::WK), group = chunk / 2;
        left = end - k0 - GROUP * group - (C::WHOLE ? 0 : 32 * (chunk % 2));
        codes_to = (group * (C::BN / 4) + row / 4) * LINE + HOLE + (row % 4 ^ 2 * group) * 32 + chunk % 2 * 16;
#pragma unroll
        for (int j = 0; j < 2; ++j)
            codes[j] = p.packed + static_cast<int64_t>(min(n0 + row + j * (C::BN / 2), p.N - 1)) * p.codes_row +
                       (k0 + 32 * chunk) / 2;
        /* else of x a thread has the same group, so that one comparison does for both */
        const int x_row = BOTH ? tid / 8 : tid / (8 * C::WK), x_group = BOTH ? 0 : group;
        const int x_chunk = C::WK == 1 || BOTH ? tid % 8 : tid % 16 / 4 * 2 + tid % 2;
        own_left = end - k0 - (BOTH ? GROUP : GROUP * group + 8 * x_chunk);
        x_to = C::X + (x_group * C::BM + x_row) * 128 + (x_chunk ^ (x_row & 1) ^ 4 * x_group) * 16;
#pragma unroll
        for (int j = 0; j < X_CHUNKS; ++j)
            x[j] = p.x + static_cast<int64_t>(min(m0 + x_row + j * X_ROWS, p.M - 1)) * p.x_row +
                   (k0 + GROUP * x_group + 8 * x_chunk) * 2;
    }

    __device__ __forceinline__ void load(const Problem &p, char *shared, int step, int steps, int n0, int k0) {
        const int stage = step % C::STAGES;
        const bool there = C::WHOLE && C::WK == 1 ? step < steps : left > step * C::BK; /* steps: to the end */
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            char *to = shared + codes_to + stage * (C::CODES * LINE) + j * (C::BN / 8 * LINE);
            if constexpr (C::GENERAL)
                copy_codes(p, to, min(n0 + static_cast<int>(threadIdx.x) / (2 * C::WK) + j * (C::BN / 2), p.N - 1),
                           k0 + step * C::BK + static_cast<int>(threadIdx.x) % (2 * C::WK) * 32, left - step * C::BK);
            else
                pk_cp_async16(to, codes[j] + step * (C::BK / 2), there);
        }
#pragma unroll
        for (int j = 0; j < X_CHUNKS; ++j) {
            const int place = stage * C::X_STAGE + j * (X_ROWS * 128);
            char *to = shared + x_to + place;
            const uint8_t *from = x[j] + step * (C::BK * 2);
            if constexpr (C::GENERAL) {
                for (int i = 0; i < 8; ++i)
                    at<uint16_t>(to, 2 * i) =
                        i < own_left - step * C::BK ? __ldg(reinterpret_cast<const uint16_t *>(from) + i) : 0;
            } else if constexpr (BOTH) {
                pk_cp_async16(to, from, step < steps);
                pk_cp_async16(shared + (x_to ^ 64) + C::BM * 128 + place, from + 2 * GROUP, own_left > step * C::BK);
            } else {
                pk_cp_async16(to, from, C::WHOLE ? there : own_left > step * C::BK);
            }
        }
    }
    __device__ __forceinline__ void advance() {
        constexpr int K = C::ROUND * C::BK;
#pragma unroll
        for (int j = 0; j < 2; ++j) pk_advance(codes[j], K / 2);
#pragma unroll
        for (int j = 0; j < X_CHUNKS; ++j) pk_advance(x[j], K * 2);
        left -= K, own_left -= K;
    }

    /* 32 codes of row n from k on: where K is odd, every other row starts in the middle of a byte. */
    static __device__ void copy_codes(const Problem &p, char *to, int n, int k, int left) {
        const int64_t element = static_cast<int64_t>(n) * p.K + k;
        const uint8_t *from = p.packed + element / 2;
        for (int i = 0; i < 16; ++i) {
            unsigned byte = 2 * i < left ? __ldg(from + i) : 0;
            if (element & 1) byte = byte << 4 | (2 * i + 1 < left ? __ldg(from + i + 1) >> 4 : 0);
            at<uint8_t>(to, i) = static_cast<uint8_t>(byte);
        }
    }
};

/* The scales of the 32 rows and 64 elements of a warp: each lane fetches one, AHEAD steps before its use, and of HALVES
 * two; shuffles then give each thread those of its four rows. */
template <typename C> struct ScaleLoader {
    static constexpr int COUNT = C::SCALING == HALVES ? 2 : 1, AHEAD = C::FULL ? 1 : 2;
    PkRawScale raw[C::ROUND][COUNT];
    uint32_t unit[COUNT]; /* 32 elements */
    int left;

    /* the warp's first row and column */
    __device__ __forceinline__ ScaleLoader(const Problem &p, int n, int k, int end) {
        /* four neighbours t have those that all of them need: of rows g + 8 t, or for each half of 64 two t, two
         * rows each */
        const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
        const int half = COUNT == 1 ? 0 : t / 2;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int row = min(n + g + 8 * (COUNT == 1 ? t : t % 2 * 2 + i), p.N - 1);
            unit[i] = static_cast<uint32_t>((static_cast<int64_t>(row) * p.K + k) / 32 + half);
        }
        left = end - k - 32 * half;
    }
    /* alike: what p has in common with the rest of its stack, at a place known beforehand */
    __device__ __forceinline__ void fetch(const Problem &p, const Problem &alike, int step) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) { /* past the end the last one of W, not used */
            const uint32_t block = min(unit[i] + step * (C::BK / 32), p.last_unit) >> alike.shift;
            raw[step % C::ROUND][i] = {pk_load_now(p.scales.values + (block >> alike.scales.outer_shift)),
                                        pk_load_now(p.scales.codes + block)};
        }
    }
    /* of the threads' rows n, n + 8, n + 16, n + 24; past the end of k zero: 0 times an infinite one is no 0 */
    template <typename T, typename S>
    __device__ __forceinline__ void take(char *shared, float offset, int step, S (&scale)[4]) {
        S own[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const float v = pk_finish_scale(raw[step % C::ROUND][i], &at<float>(shared, C::SCALE_CODE), offset);
            const float there = (C::WHOLE && C::WK == 1) || left > step * C::BK ? v : 0.0f;
            if constexpr (C::SCALING == SUMS)
                own[i] = there;
            else
                own[i] = pk_pack<T>(there, there);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            scale[j] = __shfl_sync(0xffffffffu, own[j % COUNT], j / COUNT, 4 / COUNT);
        }
    }
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) unit[i] += C::ROUND * C::BK / 32;
        left -= C::ROUND * C::BK;
    }
};

/* The scales of the 16 elements of one row that a thread works on, which may go over into the next block, or past the
 * row's end. */
struct RunScale {
    float first, second;
    int left, count;
    __device__ __forceinline__ float of(int i) const { return i < count ? (i < left ? first : second) : 0.0f; }
};
__device__ inline RunScale run_scale(const Problem &p, const float *code, float offset, int n, int k) {
    RunScale out = {0.0f, 0.0f, 0, n < p.N ? p.K - k : 0};
    if (out.count <= 0) return out;
    const int64_t element = static_cast<int64_t>(n) * p.K + k, block = element >> p.shift;
    const int64_t left = ((block + 1) << p.shift) - element;
    out.left = left < 16 ? static_cast<int>(left) : 16;
    out.first = pk_finish_scale(pk_fetch_scale(p.scales, static_cast<uint32_t>(block)), code, offset);
    if (out.left < 16 && out.left < out.count)
        out.second = pk_finish_scale(pk_fetch_scale(p.scales, static_cast<uint32_t>(block + 1)), code, offset);
    return out;
}
} // namespace mma
