/* The tiles of lora_mma.cu: their memory, and how W, its scales and x come in.
 *
 * A block of threads has a tile of BM rows and BN columns of y. Each of its 8 warps has 32 columns, that is rows of W,
 * and all BM rows of x, so that a weight is decoded once for all of them. y^T = W x^T: W is the left operand, so that a
 * row of W lies along k within a thread. The order of k within 64 is free as long as W and x agree: thread t of 4 takes
 * elements 16 t to 16 t + 15, 8 neighbouring bytes of codes and 32 of x. Codes become fragments without a shuffle, and
 * x comes by 16-byte loads.
 *
 * A byte of codes picks a pair of float32 values from a table in shared memory, the pair is multiplied by the scale and
 * rounded once: the very bits of the reference's W. The table has 16 copies, one for each lane of a half-warp, so no
 * two lanes meet in a bank; an entry is 256 bytes from the next, so one byte permute makes the address. The table fills
 * the first half of each 256-byte line; the packed bytes on their way in fill the other halves. */
#pragma once
#include "lora.cuh"
#include "ptx.cuh"
#include "scales.cuh"

namespace mma {
constexpr int THREADS = 256;
constexpr int GROUP = 64; /* elements of k that a warp works on between two barriers */
constexpr int LINES = 256, LINE = 256, HOLE = 128;

struct Problem {
    const uint8_t *x, *packed;
    PkScales scales;
    const void *b, *bias;
    const float *s, *gain; /* gain: or NULL */
    const float *start;    /* NULL, or [M, N]: what the sums start at, and r is 0 */
    uint16_t *y, *h;       /* h: with a gain, or NULL */
    float4 *partial;   /* split > 1: [tile][part][BM / 4][threads of a K group] */
    unsigned *arrived; /* split > 1: per tile, zero */
    int M, N, K, r, m_tiles, split;
    uint32_t x_row, codes_row; /* bytes */
    int shift;                 /* log2 of the block size in elements, or in 32 of them where the tile is not GENERAL */
    bool whole;                /* 64 elements from a multiple of 64 in a row have one scale */
    int b_dtype, bias_dtype;
    float scaling;
    PkTable table;
};

/* A block can have 99 KB of shared memory on sm_86 to 89 and from sm_120 on, 163 KB or more on the others. */
__host__ __device__ constexpr bool small_memory(int arch) { return (arch >= 86 && arch < 90) || arch >= 120; }
enum Where { ANY, LARGE, SMALL };

/* WK: groups of warps that share the columns and split k. WHERE: the architectures that have this tile. GENERAL: any K
 * and alignment, by plain loads, the scales looked up where they are used. */
template <int BM_, int WK_, int STAGES_, Where WHERE_, bool GENERAL_ = false> struct Tile {
    static constexpr int BM = BM_, WK = WK_, STAGES = STAGES_;
    static constexpr Where WHERE = WHERE_;
    static constexpr bool GENERAL = GENERAL_;
    static constexpr int BN = 256 / WK, BK = GROUP * WK, COLUMN_THREADS = THREADS / WK;
    using Sums = float[2][BM / 8][4]; /* of 16 rows of W, 8 of x: one product of mma.sync */
    static constexpr int QUARTERS = BM / 4; /* float4 of sums a thread */
    static constexpr int CODES = 64; /* lines of codes a stage */
    static constexpr int X = LINES * LINE, X_STAGE = BM * BK * 2;
    static constexpr int SCALES_SLOT = 2048; /* bytes, of two slots; a scale per 32 elements */
    static constexpr bool SCALES_IN_HOLES = STAGES < 4;
    static constexpr int SCALES_STEP = SCALES_IN_HOLES ? 2 * SCALES_SLOT : SCALES_SLOT;
    static constexpr int SCALES = X + STAGES * X_STAGE;
    static constexpr int SCALE_CODE = SCALES + (SCALES_IN_HOLES ? 0 : 2 * SCALES_SLOT);
    static constexpr int BYTES = SCALE_CODE + 1024;
    static_assert(BM * (BN + 8) * 2 <= BYTES && (WK == 1 || COLUMN_THREADS * BM * 4 <= BYTES), "the end reuses it");
    static_assert(BYTES <= (WHERE == LARGE ? 163 << 10 : 99 << 10), "what a block can have");
    /* offset of byte i of a slot of scales */
    static constexpr __device__ __forceinline__ int scales_at(int i) {
        return SCALES_IN_HOLES ? (STAGES * CODES + i / HOLE) * LINE + HOLE + i % HOLE : SCALES + i;
    }
};

struct alignas(8) Words {
    uint32_t x, y;
};
struct alignas(8) Floats {
    float even, odd;
};

template <typename To> __device__ __forceinline__ To &at(char *memory, int offset) {
    return *reinterpret_cast<To *>(memory + offset);
}

/* What a thread brings in: 2 chunks of 32 codes and BM * WK / 32 chunks of 8 elements of x a stage. Rows past the end
 * read the last one: what becomes of it is not stored. Past the end of k (`end`) there are zeros. */
template <typename C> struct Loader {
    static constexpr int X_CHUNKS = C::BM * C::WK / 32;
    uint32_t codes, codes_last, x, x_last; /* byte offsets of the first chunk, and of its like in the last row */
    int codes_to, x_to, codes_left, x_left; /* left: elements of k from a chunk to the end */

    __device__ __forceinline__ Loader(const Problem &p, int n0, int m0, int k0, int end) {
        const int tid = threadIdx.x;
        const int row = tid / (2 * C::WK), chunk = tid % (2 * C::WK), group = chunk / 2;
        codes_left = end - k0 - 32 * chunk;
        codes_to = (group * (C::BN / 4) + row / 4) * LINE + HOLE + (row % 4 ^ 2 * group) * 32 + chunk % 2 * 16;
        codes_last = static_cast<uint32_t>((p.N - 1) * p.codes_row) + (k0 + 32 * chunk) / 2;
        codes = static_cast<uint32_t>((n0 + row) * p.codes_row) + (k0 + 32 * chunk) / 2;
        const int x_row = tid / (8 * C::WK), x_chunk = tid % (8 * C::WK);
        x_left = end - k0 - 8 * x_chunk;
        x_to = C::X + (x_chunk / 8 * C::BM + x_row) * 128 + (x_chunk % 8 ^ (x_row & 1)) * 16;
        x_last = static_cast<uint32_t>((p.M - 1) * p.x_row) + (k0 + 8 * x_chunk) * 2;
        x = static_cast<uint32_t>((m0 + x_row) * p.x_row) + (k0 + 8 * x_chunk) * 2;
    }

    __device__ __forceinline__ void load(const Problem &p, char *shared, int stage, int n0, int k0) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            char *to = shared + codes_to + stage * (C::CODES * LINE) + j * (C::BN / 8 * LINE);
            if constexpr (C::GENERAL)
                copy_codes(p, to, min(n0 + static_cast<int>(threadIdx.x) / (2 * C::WK) + j * (C::BN / 2), p.N - 1),
                           k0 + static_cast<int>(threadIdx.x) % (2 * C::WK) * 32);
            else
                pk_cp_async16(to, p.packed + min(codes + j * (C::BN / 2) * p.codes_row, codes_last), codes_left > 0);
        }
#pragma unroll
        for (int j = 0; j < X_CHUNKS; ++j) {
            char *to = shared + x_to + stage * C::X_STAGE + j * (32 / C::WK * 128);
            const uint8_t *from = p.x + min(x + j * (32 / C::WK) * p.x_row, x_last);
            if constexpr (C::GENERAL)
                for (int i = 0; i < 8; ++i)
                    at<uint16_t>(to, 2 * i) = i < x_left ? __ldg(reinterpret_cast<const uint16_t *>(from) + i) : 0;
            else
                pk_cp_async16(to, from, x_left > 0);
        }
        codes += C::BK / 2, codes_last += C::BK / 2, codes_left -= C::BK;
        x += C::BK * 2, x_last += C::BK * 2, x_left -= C::BK;
    }

    /* 32 codes of row n from k on: where K is odd, every other row starts in the middle of a byte. */
    __device__ void copy_codes(const Problem &p, char *to, int n, int k) const {
        const int64_t element = static_cast<int64_t>(n) * p.K + k;
        const uint8_t *from = p.packed + element / 2;
        for (int i = 0; i < 16; ++i) {
            unsigned byte = 2 * i < codes_left ? __ldg(from + i) : 0;
            if (element & 1) byte = byte << 4 | (2 * i + 1 < codes_left ? __ldg(from + i + 1) >> 4 : 0);
            at<uint8_t>(to, i) = static_cast<uint8_t>(byte);
        }
    }
};

/* A thread's scales of one group of 64 elements of a row: of its two halves. The first is fetched a stage before it
 * goes to shared memory, where it lies a stage before it is used. */
template <typename C> struct ScaleLoader {
    PkRawScale raw;
    uint32_t unit; /* 32 elements */
    int left, to;

    __device__ __forceinline__ ScaleLoader(const Problem &p, int n0, int k0) {
        const int row = static_cast<int>(threadIdx.x) / C::WK, k = k0 + GROUP * (static_cast<int>(threadIdx.x) % C::WK);
        unit = static_cast<uint32_t>((static_cast<int64_t>(min(n0 + row, p.N - 1)) * p.K + k) / 32);
        left = p.K - k;
        to = C::scales_at(row * (8 * C::WK)) + static_cast<int>(threadIdx.x) % C::WK * 8;
        raw = {0.0f, 0};
    }
    __device__ __forceinline__ void fetch(const Problem &p) {
        if (left > 0) raw = pk_fetch_scale(p.scales, unit >> p.shift);
    }
    __device__ __forceinline__ void store(const Problem &p, char *shared, int slot, float offset) {
        const float *code = &at<float>(shared, C::SCALE_CODE);
        Floats v;
        v.even = v.odd = left > 0 ? pk_finish_scale(raw, code, offset) : 0.0f;
        if (!p.whole) /* rare: not asked for early */
            v.odd = left > 32 ? pk_finish_scale(pk_fetch_scale(p.scales, (unit + 1) >> p.shift), code, offset) : 0.0f;
        at<Floats>(shared, to + slot * C::SCALES_STEP) = v;
        left -= C::BK, unit += C::BK / 32;
    }
};

/* The scale of the 16 elements of one row that a thread works on. */
template <bool GENERAL> struct RunScale {
    float value;
    __device__ __forceinline__ float of(int) const { return value; }
};
template <> struct RunScale<true> { /* the run may go over into the next block, or past the row's end */
    float first, second;
    int left, count;
    __device__ __forceinline__ float of(int i) const { return i < count ? (i < left ? first : second) : 0.0f; }
};
__device__ inline RunScale<true> run_scale(const Problem &p, const float *code, float offset, int n, int k) {
    RunScale<true> out = {0.0f, 0.0f, 0, n < p.N ? p.K - k : 0};
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
