/* The functions of csrc/cuda/ptx.cuh on the host: what the PTX instructions do, with the layouts of fragments in PTX. */
#pragma once
#include "simt.h"

namespace simt {
struct LdMatrix {
    uint32_t *out;
    const char *row;
    unsigned thread;
    const void *pc;
};
/* Lane i hands over the address of row i % 8 of matrix i / 8 (8 x 8 of 16 bit). Of each matrix lane i gets the elements
 * 2 (i % 4) and 2 (i % 4) + 1 of row i / 4; transposed, those of column i / 4. */
template <int COUNT, bool TRANS> void ldmatrix(uint32_t *out, const void *row, Where where) {
    LdMatrix mine = {out, static_cast<const char *>(row), current(), __builtin_return_address(0)};
    collective(
        TRANS ? "ldmatrix.trans" : "ldmatrix", where, WHOLE, 0xffffffffu,
        [](void *const *part, unsigned) {
            for (unsigned i = 0; i < 8 * COUNT; ++i) {
                const LdMatrix *lane = static_cast<LdMatrix *>(part[i]);
                if (!is_shared(lane->row, 16))
                    fail(cudaErrorIllegalAddress, "thread %u: ldmatrix from %p, which is not in shared memory",
                         lane->thread, static_cast<const void *>(lane->row));
                if (reinterpret_cast<uintptr_t>(lane->row) % 16)
                    fail(cudaErrorMisalignedAddress, "thread %u: ldmatrix from %p, which is not 16-byte aligned",
                         lane->thread, static_cast<const void *>(lane->row));
            }
            for (int m = 0; m < COUNT; ++m)
                for (int i = 0; i < 32; ++i) {
                    LdMatrix *lane = static_cast<LdMatrix *>(part[i]);
                    uint16_t v[2];
                    for (int k = 0; k < 2; ++k) {
                        const int r = TRANS ? 2 * (i % 4) + k : i / 4, c = TRANS ? i / 4 : 2 * (i % 4) + k;
                        const char *from = static_cast<LdMatrix *>(part[8 * m + r])->row + 2 * c;
                        touch(from, 2, READ, lane->thread, lane->pc); /* by the lane that gets it */
                        memcpy(&v[k], from, 2);
                    }
                    lane->out[m] = v[0] | static_cast<uint32_t>(v[1]) << 16;
                }
        },
        &mine);
}

inline float half_of(__nv_bfloat16 *, uint32_t word, int k) { return __uint_as_float(k ? word & 0xffff0000u : word << 16); }
inline float half_of(__half *, uint32_t word, int k) {
    return __half2float(__half{static_cast<uint16_t>(word >> (16 * k))});
}
struct Mma {
    float *d;
    const uint32_t *a, *b;
};
/* m16n8k16, d += a b, in float32, k rising. Lane i, g = i / 4, t = i % 4: a[0..3] hold the pairs (row g, g + 8, g, g + 8;
 * columns from 2t, 2t, 2t + 8, 2t + 8), b[0..1] the pairs (rows from 2t, 2t + 8; column g), d[0..3] (row g, g, g + 8,
 * g + 8; column 2t, 2t + 1, 2t, 2t + 1). */
template <typename T> void mma(float *d, const uint32_t *a, const uint32_t *b, Where where) {
    Mma mine = {d, a, b};
    collective(
        "mma", where, WHOLE, 0xffffffffu,
        [](void *const *part, unsigned) {
            float A[16][16], B[16][8];
            for (int i = 0; i < 32; ++i) {
                const Mma *lane = static_cast<Mma *>(part[i]);
                const int g = i / 4, t = i % 4;
                for (int k = 0; k < 2; ++k) {
                    for (int r = 0; r < 4; ++r)
                        A[g + r % 2 * 8][2 * t + r / 2 * 8 + k] = half_of(static_cast<T *>(nullptr), lane->a[r], k);
                    for (int r = 0; r < 2; ++r)
                        B[2 * t + r * 8 + k][g] = half_of(static_cast<T *>(nullptr), lane->b[r], k);
                }
            }
            for (int i = 0; i < 32; ++i)
                for (int r = 0; r < 4; ++r) {
                    const int row = i / 4 + r / 2 * 8, column = 2 * (i % 4) + r % 2;
                    float sum = static_cast<Mma *>(part[i])->d[r];
                    for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
                    static_cast<Mma *>(part[i])->d[r] = sum;
                }
        },
        &mine);
}
} // namespace simt

inline void pk_cp_async16(void *shared, const void *global, bool valid) { simt::cp_async16(shared, global, valid); }
inline void pk_cp_async_commit() { simt::cp_async_commit(); }
template <int N> inline void pk_cp_async_wait() { simt::cp_async_wait(N); }

#define PK_SIMT_LDMATRIX(name, count, trans)                                                                           \
    inline void name(uint32_t (&r)[count], const void *shared, simt::Where where = {}) {                               \
        simt::ldmatrix<count, trans>(r, shared, where);                                                                \
    }
PK_SIMT_LDMATRIX(pk_ldmatrix_x1, 1, false)
PK_SIMT_LDMATRIX(pk_ldmatrix_x2, 2, false)
PK_SIMT_LDMATRIX(pk_ldmatrix_x4, 4, false)
PK_SIMT_LDMATRIX(pk_ldmatrix_x1_trans, 1, true)
PK_SIMT_LDMATRIX(pk_ldmatrix_x2_trans, 2, true)
PK_SIMT_LDMATRIX(pk_ldmatrix_x4_trans, 4, true)
#undef PK_SIMT_LDMATRIX

inline void pk_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where = {}) {
    simt::mma<__nv_bfloat16>(d, a, b, where);
}
inline void pk_mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where = {}) {
    simt::mma<__half>(d, a, b, where);
}

inline uint4 pk_load_stream16(const void *global) { return *static_cast<const uint4 *>(global); }
inline uint32_t pk_prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
using pk_shared_t = uintptr_t; /* here an address is a pointer */
inline pk_shared_t pk_shared_address(const void *shared) { return reinterpret_cast<uintptr_t>(shared); }
template <typename C> C pk_and_or(uint32_t a, uint32_t b, C c) { return (a & b) | c; }
inline float pk_load_shared(pk_shared_t address) { return *reinterpret_cast<const float *>(address); }
inline float4 pk_load_fresh16(const float4 *global) { return *global; }
