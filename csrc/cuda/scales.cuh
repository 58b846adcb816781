/* The scales of 4-bit weights: float32 (plain), or 8-bit codes (nested), whose value is
 * code[codes[block]] * values[block / nested_blocksize] + offset, product and sum rounded apart.
 *
 * Kernels that have no time for a branch, and no second copy, treat a plain scale as nested in a code that is 1
 * everywhere, an offset of 0 and an inner block size of 1, which changes no bit. The others say NESTED at compile
 * time. */
#pragma once
#include "values.cuh"

struct PkScales {
    const float *values;  /* plain: the scales; nested: their scales */
    const uint8_t *codes; /* nested: a code per block; plain: any bytes, as many */
    const float *nested_code, *offset; /* NULL: plain */
    uint32_t factor;      /* block / nested_blocksize = (block * factor) >> (31 + shift) */
    int shift;
    int block_shift, outer_shift; /* log2 of blocksize, and of nested_blocksize where that is a power of two */
};

/* absmax: float32, or codes where nested_code is given. Fewer than 2^31 blocks; blocksize is a power of two. */
inline PkScales pk_scales_of(const void *absmax, const float *nested_absmax, const float *nested_code,
                             const float *offset, int64_t blocksize, int64_t nested_blocksize) {
    const bool nested = nested_code != nullptr;
    const int64_t most = int64_t(1) << 31, d = nested ? (nested_blocksize < most ? nested_blocksize : most) : 1;
    /* 2^(31 + shift) / d, rounded up by less than d <= 2^shift parts: exact quotients of numbers below 2^31 */
    const int shift = pk_log2(d);
    const uint64_t factor = ((uint64_t(1) << (31 + shift)) + d - 1) / d;
    return {nested ? nested_absmax : static_cast<const float *>(absmax), static_cast<const uint8_t *>(absmax),
            nested_code, nested ? offset : nullptr, static_cast<uint32_t>(factor), shift, pk_log2(blocksize), shift};
}

__device__ __forceinline__ float pk_scale_code(const PkScales &s, int i) {
    return s.nested_code ? __ldg(s.nested_code + i) : 1.0f;
}
__device__ __forceinline__ float pk_scale_offset(const PkScales &s) { return s.offset ? __ldg(s.offset) : 0.0f; }

/* The parts of one block's scale that come from memory: asked for early, finished when it is needed. */
struct PkRawScale {
    float value;
    uint32_t code;
};
__device__ __forceinline__ PkRawScale pk_fetch_scale(const PkScales &s, uint32_t block) {
    const uint32_t outer = static_cast<uint32_t>(static_cast<uint64_t>(block << 1) * s.factor >> 32) >> s.shift;
    return {__ldg(s.values + outer), __ldg(s.codes + block)};
}
/* code: the 256 values of pk_scale_code(), where they are fast to read; offset: pk_scale_offset(). */
__device__ __forceinline__ float pk_finish_scale(PkRawScale raw, const float *code, float offset) {
    return __fadd_rn(__fmul_rn(code[raw.code], raw.value), offset);
}
/* The same where it is known which of the two it is; nested_blocksize is a power of two, code not read for plain
 * ones. */
template <bool NESTED> __device__ __forceinline__ PkRawScale pk_fetch_scale(const PkScales &s, uint32_t block) {
    if (!NESTED) return {__ldg(s.values + block), 0};
    return {__ldg(s.values + (block >> s.outer_shift)), __ldg(s.codes + block)};
}
template <bool NESTED>
__device__ __forceinline__ float pk_finish_scale(PkRawScale raw, const float *code, float offset) {
    return NESTED ? pk_finish_scale(raw, code, offset) : raw.value;
}
/* Scale of the block that holds the flat element e. */
__device__ __forceinline__ float pk_scale(const PkScales &s, const float *code, float offset, int64_t e) {
    return pk_finish_scale(pk_fetch_scale(s, static_cast<uint32_t>(e >> s.block_shift)), code, offset);
}
