/* Integers of 4 bits by group (PK_INT4; pk_abi.h says what the parts are): a weight is (code - zero) * scale + shift,
 * difference, product and sum each rounded once.
 *
 * The matrix products take W = scale * (code - 8) + c instead, with c = shift - scale * (zero - 8): the first term is
 * a table of the 16 values -8 .. 7, exact in 16 bits, with a float32 scale a block as NF4 has it, and the second has
 * one value for each row of W and group of columns, so that it is a pair of low-rank factors: X W^T takes sums c^T
 * beside it, where sums [M, G] are those of x over groups, and dy W takes (dy c)[m, group of k]. */
#pragma once
#include "values.cuh"

struct PkGroups {
    const void *scales, *zeros, *shifts; /* [N, G]; zeros and shifts: or NULL */
    int dtype, zeros_dtype;
};
inline PkGroups pk_groups_of(const pk_lora_args &a) {
    return {a.absmax, a.nested_absmax, a.offset, static_cast<int>(a.w_dtype), static_cast<int>(a.nested_blocksize)};
}

/* Of one group. */
struct PkGroup {
    float scale, zero, shift;
    __device__ __forceinline__ float of(unsigned code) const {
        return __fmul_rn(__fsub_rn(static_cast<float>(code), zero), scale);
    }
};
__device__ __forceinline__ PkGroup pk_group(const PkGroups &g, int64_t at) {
    PkGroup out = {pk_load_as(g.scales, g.dtype, at), 8.0f, 0.0f};
    if (g.zeros)
        out.zero = g.zeros_dtype == PK_U8 ? static_cast<float>(static_cast<const uint8_t *>(g.zeros)[at])
                                          : pk_load_as(g.zeros, g.zeros_dtype, at);
    if (g.shifts) out.shift = pk_load_as(g.shifts, g.dtype, at);
    return out;
}
/* Without shifts no sum is taken, which a zero's sign would show. */
__device__ __forceinline__ float pk_group_value(const PkGroups &g, const PkGroup &group, unsigned code) {
    const float v = group.of(code);
    return g.shifts ? __fadd_rn(v, group.shift) : v;
}

/* The factors beside the table's product, as lora_groups.cu leaves them: NULL, 0 where c is 0 everywhere. */
struct PkBeside {
    const float *sums, *c; /* of x [M, G] (in the forward), and [N, G] */
    int count;             /* G */
};
inline PkBeside pk_beside_of(const pk_lora_args &a) {
    if (a.quant_type != PK_INT4 || !a.nested_absmax) return {nullptr, nullptr, 0};
    return {a.offset, a.nested_absmax, static_cast<int>(a.K / a.blocksize)};
}
