/* Vector types, bit casts, bfloat16 and float16, and the integer and float32 intrinsics. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

/* Only the race-instrumented build looks at alignment; the host itself reads vectors anywhere. */
#if defined(PK_SIMT_RACES)
#define PK_SIMT_ALIGN(n) alignas(n)
#else
#define PK_SIMT_ALIGN(n)
#endif
#define PK_SIMT_VECTORS(type, name)                                                                                    \
    struct PK_SIMT_ALIGN(2 * sizeof(type)) name##2 {                                                                   \
        type x, y;                                                                                                     \
    };                                                                                                                 \
    struct PK_SIMT_ALIGN(sizeof(type) < 4 ? 4 * sizeof(type) : 16) name##4 {                                           \
        type x, y, z, w;                                                                                               \
    };                                                                                                                 \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                   \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
PK_SIMT_VECTORS(float, float)
PK_SIMT_VECTORS(int32_t, int)
PK_SIMT_VECTORS(uint32_t, uint)
PK_SIMT_VECTORS(uint16_t, ushort)
PK_SIMT_VECTORS(uint8_t, uchar)
#undef PK_SIMT_VECTORS

namespace simt {
template <typename To, typename From> To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
    To out;
    memcpy(&out, &v, sizeof out);
    return out;
}
} // namespace simt

inline float __uint_as_float(uint32_t v) { return simt::bits<float>(v); }
inline uint32_t __float_as_uint(float v) { return simt::bits<uint32_t>(v); }
inline float __int_as_float(int32_t v) { return simt::bits<float>(v); }
inline int32_t __float_as_int(float v) { return simt::bits<int32_t>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
/* CUDA's take an int with an unsigned; of floats they pass over NaN. */
template <typename A, typename B> std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point_v<T>) return static_cast<T>(fmin(a, b));
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B> std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point_v<T>) return static_cast<T>(fmax(a, b));
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
/* Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes of a (0 to 3) and b (4 to 7). */
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i)
        out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xffu) << (8 * i);
    return out;
}

struct __nv_bfloat16 {
    uint16_t x;
};
struct __half {
    uint16_t x;
};
struct PK_SIMT_ALIGN(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct PK_SIMT_ALIGN(4) __half2 {
    __half x, y;
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;

inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(static_cast<uint32_t>(h.x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    const uint32_t b = __float_as_uint(v);
    return {static_cast<uint16_t>(v != v ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}
inline float __half2float(__half h) {
    const uint32_t magnitude = static_cast<uint32_t>(h.x & 0x7fff) << 13,
                   sign = static_cast<uint32_t>(h.x & 0x8000) << 16;
    if (magnitude >= 0x0f800000u) return __uint_as_float(sign | 0x70000000u | magnitude); /* infinity, NaN */
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f)); /* another exponent bias */
}
inline __half __float2half_rn(float v) {
    const uint32_t b = __float_as_uint(v) & 0x7fffffffu, sign = (__float_as_uint(v) >> 16) & 0x8000u;
    uint32_t h;
    if (b > 0x7f800000u)
        return {0x7fff};
    else if (b >= 0x47800000u)
        h = 0x7c00;
    else if (b < 0x38800000u) /* subnormal: the sum with 0.5 rounds to multiples of 2^-24 */
        h = __float_as_uint(__uint_as_float(b) + 0.5f) - 0x3f000000u;
    else
        h = (b - (112u << 23) + 0xfff + ((b >> 13) & 1)) >> 13;
    return {static_cast<uint16_t>(sign | h)};
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half __ushort_as_half(unsigned short v) { return {v}; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return {v}; }
inline unsigned short __half_as_ushort(__half v) { return v.x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.x; }

/* Pairs: x is the low half. */
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
