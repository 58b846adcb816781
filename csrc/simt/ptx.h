/* The functions of csrc/cuda/ptx.cuh on the host; ptx.cpp does them. */
#pragma once
#include "simt.h"

namespace simt {
void cp_async16(void *shared, const void *global, bool valid);
void cp_async_commit();
void cp_async_wait(unsigned open);
void ldmatrix(int count, bool trans, uint32_t *out, const void *row, Where where);
void mma(bool bf16, float *d, const uint32_t *a, const uint32_t *b, Where where);
} // namespace simt

inline void pk_cp_async16(void *shared, const void *global, bool valid) { simt::cp_async16(shared, global, valid); }
inline void pk_cp_async_commit() { simt::cp_async_commit(); }
template <int N> inline void pk_cp_async_wait() { simt::cp_async_wait(N); }

#define PK_SIMT_LDMATRIX(name, count, trans)                                                                           \
    inline void name(uint32_t (&r)[count], const void *shared, simt::Where where = {}) {                               \
        simt::ldmatrix(count, trans, r, shared, where);                                                                \
    }
PK_SIMT_LDMATRIX(pk_ldmatrix_x1, 1, false)
PK_SIMT_LDMATRIX(pk_ldmatrix_x2, 2, false)
PK_SIMT_LDMATRIX(pk_ldmatrix_x4, 4, false)
PK_SIMT_LDMATRIX(pk_ldmatrix_x1_trans, 1, true)
PK_SIMT_LDMATRIX(pk_ldmatrix_x2_trans, 2, true)
PK_SIMT_LDMATRIX(pk_ldmatrix_x4_trans, 4, true)
#undef PK_SIMT_LDMATRIX

inline void pk_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where = {}) {
    simt::mma(true, d, a, b, where);
}
inline void pk_mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where = {}) {
    simt::mma(false, d, a, b, where);
}

inline uint4 pk_load_stream16(const void *global) { return simt::read_only(static_cast<const uint4 *>(global)); }
inline void pk_wait_for_previous(simt::Where where = {}) { simt::wait_for_previous(where); }
inline void pk_release_next() { simt::release_next(); }
inline uint32_t pk_prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
/* off by one place in either direction, or not at all: what users do about it is then seen to work */
inline float pk_reciprocal(float v) {
    const uint32_t bits = __float_as_uint(v), exact = __float_as_uint(1.0f / v);
    return __uint_as_float(exact + (bits * 2654435769u >> 16) % 3 - 1);
}
using pk_shared_t = uintptr_t; /* here an address is a pointer */
inline pk_shared_t pk_shared_address(const void *shared) { return reinterpret_cast<uintptr_t>(shared); }
template <typename C> C pk_and_or(uint32_t a, uint32_t b, C c) { return (a & b) | c; }
inline uint32_t pk_blend(uint32_t a, uint32_t b, uint32_t mask) { return (a & mask) | (b & ~mask); }
inline float pk_load_shared(pk_shared_t address) { return *reinterpret_cast<const float *>(address); }
inline unsigned pk_thread_again() { return threadIdx.x; }
inline unsigned pk_block_again(int axis) { return axis == 0 ? blockIdx.x : blockIdx.y; }
inline int pk_fixed(int v) { return v; }
inline void pk_advance(const uint8_t *&p, int64_t bytes) { p += bytes; }
inline float pk_load_now(const float *global) { return simt::read_only(global); }
inline uint32_t pk_load_now(const uint8_t *global) { return simt::read_only(global); }
inline float pk_load_fresh(const float *global) { return *global; }
inline float4 pk_load_fresh16(const float4 *global) { return *global; }
inline uint4 pk_load_fresh16(const uint4 *global) { return *global; }
/* The sum of a product, which float64 holds exactly, and a number, rounded once. */
template <typename T> uint32_t pk_fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto value = [i](uint32_t word) {
            if constexpr (std::is_same_v<T, __half>) return __half2float({static_cast<uint16_t>(word >> i)});
            return __uint_as_float(word >> i << 16);
        };
        const double exact = static_cast<double>(value(a)) * value(b) + value(c);
        float v = static_cast<float>(exact);
        /* to odd: what follows rounds as if it were exact */
        if (v != exact && exact == exact && !(__float_as_uint(v) & 1))
            v = nextafterf(v, v < exact ? INFINITY : -INFINITY);
        uint16_t half;
        if constexpr (std::is_same_v<T, __half>)
            half = __float2half_rn(v).x;
        else
            half = __float2bfloat16_rn(v).x;
        out |= static_cast<uint32_t>(half) << i;
    }
    return out;
}
