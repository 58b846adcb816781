/* Values in and out of global memory: eight floats at a time, element types rounded once, 4-bit tables. */
#pragma once
#include "common.cuh"

/* The 16 values of a code table, by code; handed to kernels by value. */
struct PkTable {
    float value[16];
};
inline PkTable pk_table_of(const float *values, float factor = 1.0f) {
    PkTable t;
    for (int k = 0; k < 16; ++k) t.value[k] = values[k] * factor;
    return t;
}
/* Of a weight of pk_lora_args; integers by group have the values -8 .. 7 (groups.cuh). */
inline PkTable pk_table_of(const pk_lora_args &a, float factor = 1.0f) {
    if (a.table && a.quant_type != PK_INT4) return pk_table_of(a.table, factor);
    PkTable t = {};
    for (int k = 0; a.quant_type == PK_INT4 && k < 16; ++k) t.value[k] = static_cast<float>(k - 8) * factor;
    return t;
}
/* Factor of a table that is rounded to 16 bits (PK_BF16 or PK_F16), to be divided by later. All weights of one code
 * have one rounding error, so where x has a mean they add up: with these factors their own mean, over the codes of
 * normal weights at any block size and over codes that are as frequent, is a fifteenth of what it is without
 * (bfloat16; tests/test_lora_mma_simt.py). FP4's values and integers are exact. */
inline float pk_table_factor(int64_t quant_type, int64_t dtype) {
    if (quant_type == PK_INT4) return 1.0f;
    if (quant_type == PK_FP4) return 0x1.02p+0f;
    return dtype == PK_BF16 ? 0x1.bc868p+0f : 0x1.637b2p+0f;
}

inline int pk_log2(int64_t power) {
    int shift = 0;
    while ((int64_t(1) << shift) < power) ++shift;
    return shift;
}
inline bool pk_power_of_two(int64_t v) { return v > 0 && (v & (v - 1)) == 0; }

template <typename T> __device__ __forceinline__ T pk_rounded(float v);
template <> __device__ __forceinline__ float pk_rounded<float>(float v) { return v; }
template <> __device__ __forceinline__ __nv_bfloat16 pk_rounded<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}
template <> __device__ __forceinline__ __half pk_rounded<__half>(float v) { return __float2half_rn(v); }

__device__ __forceinline__ float pk_float(float v) { return v; }
__device__ __forceinline__ float pk_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float pk_float(__half v) { return __half2float(v); }

/* Two values as one word, the first in the low half. */
template <typename T> __device__ __forceinline__ uint32_t pk_pack(float low, float high) {
    union {
        T half[2];
        uint32_t word;
    } out;
    out.half[0] = pk_rounded<T>(low);
    out.half[1] = pk_rounded<T>(high);
    return out.word;
}

/* The two values of a word. */
template <typename T> __device__ __forceinline__ void pk_unpack(uint32_t word, float *v);
template <> __device__ __forceinline__ void pk_unpack<__nv_bfloat16>(uint32_t word, float *v) {
    v[0] = __uint_as_float(word << 16);
    v[1] = __uint_as_float(word & 0xffff0000u);
}
template <> __device__ __forceinline__ void pk_unpack<__half>(uint32_t word, float *v) {
    v[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    v[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

/* Eight neighbouring elements as floats, from memory that is 16-byte aligned. */
__device__ __forceinline__ void pk_load8(const float *p, float *v) {
    const float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <typename T> __device__ __forceinline__ void pk_load8(const T *p, float *v) { /* the 16-bit types */
    const uint4 raw = *reinterpret_cast<const uint4 *>(p);
    pk_unpack<T>(raw.x, v), pk_unpack<T>(raw.y, v + 2), pk_unpack<T>(raw.z, v + 4), pk_unpack<T>(raw.w, v + 6);
}

/* Four neighbouring elements as floats, and back, rounded once. fast: all four are there, and aligned to their size;
 * else those from `left` on are zeros, and are not written. */
template <typename T> __device__ __forceinline__ void pk_load4(const T *p, int64_t left, bool fast, float *v) {
    if (!fast) {
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = k < left ? pk_float(p[k]) : 0.0f;
    } else if constexpr (sizeof(T) == 4) {
        const float4 raw = *reinterpret_cast<const float4 *>(p);
        v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
    } else {
        const uint2 raw = *reinterpret_cast<const uint2 *>(p);
        pk_unpack<T>(raw.x, v), pk_unpack<T>(raw.y, v + 2);
    }
}
template <typename T> __device__ __forceinline__ void pk_store4(T *p, int64_t left, bool fast, const float *v) {
    if (!fast) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (k < left) p[k] = pk_rounded<T>(v[k]);
    } else if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4 *>(p) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
        *reinterpret_cast<uint2 *>(p) = make_uint2(pk_pack<T>(v[0], v[1]), pk_pack<T>(v[2], v[3]));
    }
}

/* Element i, or eight from i on (those from `left` on are zero), of a tensor whose dtype is known at run time only: a
 * branch that all threads take alike. fast: all eight are there and 16-byte aligned. */
__device__ __forceinline__ float pk_load_as(const void *p, int dtype, int64_t i) {
    if (dtype == PK_F32) return static_cast<const float *>(p)[i];
    if (dtype == PK_BF16) return __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
    return __half2float(static_cast<const __half *>(p)[i]);
}
__device__ __forceinline__ void pk_load8_as(const void *p, int dtype, int64_t i, int64_t left, bool fast, float *v) {
    if (!fast) {
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = k < left ? pk_load_as(p, dtype, i + k) : 0.0f;
    } else if (dtype == PK_F32) {
        pk_load8(static_cast<const float *>(p) + i, v);
    } else if (dtype == PK_BF16) {
        pk_load8(static_cast<const __nv_bfloat16 *>(p) + i, v);
    } else {
        pk_load8(static_cast<const __half *>(p) + i, v);
    }
}
/* COUNT elements, `pitch` apart, as above; the loads do not wait for one another. */
template <int COUNT>
__device__ __forceinline__ void pk_load_column(const void *p, int dtype, int64_t i, int64_t pitch, int left, float *v) {
    const auto load = [&](auto *from) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) v[k] = k < left ? pk_float(from[i + k * pitch]) : 0.0f;
    };
    if (dtype == PK_F32)
        load(static_cast<const float *>(p));
    else if (dtype == PK_BF16)
        load(static_cast<const __nv_bfloat16 *>(p));
    else
        load(static_cast<const __half *>(p));
}
__device__ __forceinline__ void pk_store_as(void *p, int dtype, int64_t i, float v) {
    if (dtype == PK_F32)
        static_cast<float *>(p)[i] = v;
    else if (dtype == PK_BF16)
        static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(v);
    else
        static_cast<__half *>(p)[i] = __float2half_rn(v);
}
