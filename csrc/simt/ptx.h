/* The functions of csrc/cuda/ptx.cuh on the host: what the PTX instructions do, fragment layouts included. */
#pragma once
#include "simt.h"

namespace simt {

struct LdMatrix {
    uint32_t *out;
    const void *row;
};
/* Lane i hands over the address of row i % 8 of matrix i / 8 (8 x 8 of 16 bit). Of each matrix lane i gets the elements
 * 2 (i % 4) and 2 (i % 4) + 1 of row i / 4; transposed, those of column i / 4. */
template <int COUNT, bool TRANS> void ldmatrix(uint32_t *out, const void *row) {
    LdMatrix mine = {out, row};
    collective(0xffffffffu, [](void *const *part, unsigned) {
        for (int m = 0; m < COUNT; ++m)
            for (int i = 0; i < WARP; ++i) {
                uint32_t word = 0;
                for (int k = 0; k < 2; ++k) {
                    const int c = 2 * (i % 4) + k, r = i / 4;
                    uint16_t v;
                    const void *from = static_cast<LdMatrix *>(part[8 * m + (TRANS ? c : r)])->row;
                    memcpy(&v, static_cast<const char *>(from) + 2 * (TRANS ? r : c), 2);
                    word |= static_cast<uint32_t>(v) << (16 * k);
                }
                static_cast<LdMatrix *>(part[i])->out[m] = word;
            }
    }, &mine);
}

struct Mma {
    float *d;
    const uint32_t *a, *b;
};
template <typename T> float half_of(uint32_t word, int k);
template <> inline float half_of<__nv_bfloat16>(uint32_t word, int k) {
    return __uint_as_float(k ? word & 0xffff0000u : word << 16);
}
template <> inline float half_of<__half>(uint32_t word, int k) {
    return __half2float(__half{static_cast<uint16_t>(word >> (16 * k))});
}
/* m16n8k16, d += a b. Lane i, g = i / 4, t = i % 4: a[0..3] hold the pairs (row g, g + 8, g, g + 8; column 2t, 2t, 2t + 8,
 * 2t + 8 and the next), b[0..1] the pairs (row 2t, 2t + 8 and the next; column g), d[0..3] (row g, g, g + 8, g + 8;
 * column 2t, 2t + 1, 2t, 2t + 1). */
template <typename T> void mma(float *d, const uint32_t *a, const uint32_t *b) {
    Mma mine = {d, a, b};
    collective(0xffffffffu, [](void *const *part, unsigned) {
        float A[16][16], B[16][8];
        for (int i = 0; i < WARP; ++i) {
            const Mma *lane = static_cast<Mma *>(part[i]);
            const int g = i / 4, t = i % 4;
            for (int k = 0; k < 2; ++k) {
                for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][2 * t + r / 2 * 8 + k] = half_of<T>(lane->a[r], k);
                for (int r = 0; r < 2; ++r) B[2 * t + r * 8 + k][g] = half_of<T>(lane->b[r], k);
            }
        }
        for (int i = 0; i < WARP; ++i)
            for (int r = 0; r < 4; ++r) {
                const int row = i / 4 + r / 2 * 8, column = 2 * (i % 4) + r % 2;
                float sum = static_cast<Mma *>(part[i])->d[r];
                for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
                static_cast<Mma *>(part[i])->d[r] = sum;
            }
    }, &mine);
}
} // namespace simt

inline void pk_cp_async16(void *shared, const void *global, bool valid) {
    if (valid)
        memcpy(shared, global, 16);
    else
        memset(shared, 0, 16);
}
inline void pk_cp_async_commit() {}
template <int N> inline void pk_cp_async_wait() {}

inline void pk_ldmatrix_x1(uint32_t &r, const void *shared) { simt::ldmatrix<1, false>(&r, shared); }
inline void pk_ldmatrix_x2(uint32_t (&r)[2], const void *shared) { simt::ldmatrix<2, false>(r, shared); }
inline void pk_ldmatrix_x4(uint32_t (&r)[4], const void *shared) { simt::ldmatrix<4, false>(r, shared); }
inline void pk_ldmatrix_x1_trans(uint32_t &r, const void *shared) { simt::ldmatrix<1, true>(&r, shared); }
inline void pk_ldmatrix_x2_trans(uint32_t (&r)[2], const void *shared) { simt::ldmatrix<2, true>(r, shared); }
inline void pk_ldmatrix_x4_trans(uint32_t (&r)[4], const void *shared) { simt::ldmatrix<4, true>(r, shared); }

inline void pk_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { simt::mma<__nv_bfloat16>(d, a, b); }
inline void pk_mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { simt::mma<__half>(d, a, b); }

inline uint4 pk_load_stream16(const void *global) { return *static_cast<const uint4 *>(global); }

/* Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes of a (0 to 3) and b (4 to 7). */
inline uint32_t pk_prmt(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i)
        out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xffu) << (8 * i);
    return out;
}

inline uint32_t pk_and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
