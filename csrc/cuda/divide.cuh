/* IEEE division, to the last bit (a zero's sign apart), without the call that the compiler makes for the numbers at
 * the ends of the range (its __fdiv_rn keeps registers in local memory around it). For divisors that are not
 * negative, and v finite where they are. */
#pragma once
#include "ptx.cuh"

/* v / d. By way of float64: the quotient of two floats is no closer than 2^-49 of itself to the middle between two
 * floats that it does not hit, and the error here is below 2^-51. */
__device__ __forceinline__ float pk_divide(float v, float d) {
    constexpr float UP = 18446744073709551616.0f; /* 2^64: brings d to where its reciprocal is a normal number, too */
    if (!(d > 0.0f && d <= 3.402823466e+38f)) return v * (d == 0.0f ? __uint_as_float(0x7f800000u) : d == d ? 0.0f : d);
    const float scale = d < 1.0f ? UP : 1.0f / UP, scaled = d * scale;
    const double x = scaled, y = static_cast<double>(v) * scale;
    double r = pk_reciprocal(scaled);
    r = fma(r, fma(-x, r, 1.0), r);
    r = fma(r, fma(-x, r, 1.0), r);
    const double q = y * r;
    return static_cast<float>(fma(fma(-x, q, y), r, q));
}

/* 1 / d: away from the ends of the range two steps give the last bit from an estimate that is off by one place at most
 * (all mantissas were tried), but for the largest mantissa. */
__device__ __forceinline__ float pk_inverse(float d) {
    if (!(d > 1e-36f && d < 1e36f) || (__float_as_uint(d) & 0x7fffffu) == 0x7fffffu) return pk_divide(1.0f, d);
    float r = pk_reciprocal(d);
    r = fmaf(r, fmaf(-d, r, 1.0f), r);
    return fmaf(r, fmaf(-d, r, 1.0f), r);
}
