"""Triton kernels of quantize_4bit. Imported only when one is launched.

The float32 operations are the reference's, each rounded by itself (`triton_lib.host` compiles without fused
multiply-add; `div_rn` divides exactly, which `/` does not), so the bytes are the reference's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rank(b_s, p_mid):
    """Rank among 16 by the 15 midpoints at p_mid: how many of them are not >= b_s. A NaN gets 15."""
    m0 = tl.load(p_mid + 0)
    m1 = tl.load(p_mid + 1)
    m2 = tl.load(p_mid + 2)
    m3 = tl.load(p_mid + 3)
    m4 = tl.load(p_mid + 4)
    m5 = tl.load(p_mid + 5)
    m6 = tl.load(p_mid + 6)
    m7 = tl.load(p_mid + 7)
    m8 = tl.load(p_mid + 8)
    m9 = tl.load(p_mid + 9)
    m10 = tl.load(p_mid + 10)
    m11 = tl.load(p_mid + 11)
    m12 = tl.load(p_mid + 12)
    m13 = tl.load(p_mid + 13)
    m14 = tl.load(p_mid + 14)
    # four comparisons down a tree of midpoints; `low` where the value is <= the midpoint, and then not for a NaN
    low3 = b_s <= m7
    low2 = b_s <= tl.where(low3, m3, m11)
    low1 = b_s <= tl.where(low3, tl.where(low2, m1, m5), tl.where(low2, m9, m13))
    b_left = tl.where(low2, tl.where(low1, m0, m2), tl.where(low1, m4, m6))
    b_right = tl.where(low2, tl.where(low1, m8, m10), tl.where(low1, m12, m14))
    low0 = b_s <= tl.where(low3, b_left, b_right)
    return tl.where(low3, 0, 8) + tl.where(low2, 0, 4) + tl.where(low1, 0, 2) + tl.where(low0, 0, 1)


@triton.jit
def quantize_kernel(
    p_w,
    p_mid,
    p_order,
    p_packed,
    p_absmax,
    numel,
    IN_ORDER: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of the format per program. IN_ORDER: the codes ascend with their values (NF4)."""
    i_pid = tl.program_id(0).to(tl.int64)
    i_block = i_pid * BLOCKS + tl.arange(0, BLOCKS)
    i_first = i_block * BLOCKSIZE
    i_e = i_first[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    b_w = tl.load(p_w + i_e, mask=i_e < numel, other=0.0)
    if p_w.dtype.element_ty == tl.bfloat16:
        # by its bits: Triton's interpreter widens subnormals wrongly
        b_w = (b_w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        b_w = b_w.to(tl.float32)
    # magnitudes compare as integers, and there a NaN is the largest
    b_bits = tl.max(b_w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    b_top = b_bits.to(tl.float32, bitcast=True)
    # tl.full: as a bare literal the subnormal would become a float64
    b_tiny = tl.full([BLOCKS], 1e-38, tl.float32)
    b_divisor = tl.where(b_top < b_tiny, b_tiny, b_top)
    b_inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), b_divisor)
    b_full = i_first + BLOCKSIZE <= numel
    tl.store(p_absmax + i_block, tl.where(b_full, b_top, b_divisor), mask=i_first < numel)
    b_s = b_w * b_inverse[:, None]
    if (i_pid + 1) * (BLOCKS * BLOCKSIZE) > numel:
        # the last block is divided, not multiplied; the division of all blocks here is paid by one program only
        b_quotient = tl.div_rn(b_w, tl.broadcast_to(b_divisor[:, None], (BLOCKS, BLOCKSIZE)))
        # the spare nibble of an odd count holds the code of zero, whatever the divisor
        b_s = tl.where(b_full[:, None], b_s, tl.where(i_e < numel, b_quotient, 0.0))
    b_code = _rank(b_s, p_mid)
    if not IN_ORDER:
        b_code = tl.load(p_order + b_code).to(tl.int32)
    b_even, b_odd = tl.split(tl.reshape(b_code, (BLOCKS, BLOCKSIZE // 2, 2)))
    i_byte = (i_first // 2)[:, None] + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(p_packed + i_byte, ((b_even << 4) | b_odd).to(tl.uint8), mask=i_byte < (numel + 1) // 2)


@triton.jit
def absmax_kernel(p_absmax, p_offset, p_rounding, p_codes, p_nested, n, BLOCKSIZE: tl.constexpr):
    """The scales in 8 bits, one block of them per program; see `levels.py`."""
    i_pid = tl.program_id(0).to(tl.int64)
    i = i_pid * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    b_in = i < n
    b_v = tl.load(p_absmax + i, mask=b_in, other=0.0) - tl.load(p_offset)
    b_v = tl.where(b_in, b_v, 0.0)
    b_magnitude = tl.abs(b_v)
    b_most = tl.max(tl.where(b_v == b_v, b_magnitude, 0.0), axis=0)  # NaNs are passed over
    tl.store(p_nested + i_pid, b_most)
    b_one = tl.full([BLOCKSIZE], 1.0, tl.float32)
    b_s = b_v * tl.div_rn(b_one, tl.broadcast_to(b_most, (BLOCKSIZE,)))
    b_ok = b_s == b_s  # 0 / 0 and inf / inf are code 0
    b_s = tl.where(b_s > 1.0, 1.0, tl.where(b_s < -1.0, -1.0, b_s))
    i_grid = tl.where(b_ok, (b_s + 1.0) * 32767.5 + 0.5, 0.0).to(tl.int32)
    tl.store(p_codes + i, tl.load(p_rounding + i_grid), mask=b_in)
