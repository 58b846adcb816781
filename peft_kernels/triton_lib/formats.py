"""Decode steps of the formats of weights beyond NF4 and FP4, one device function a family; `load_weight` takes them.

What bytes mean is in `peft_kernels/formats/known`: every product, difference and sum is rounded once, so the bits are
the reference's. A tile [R, C] is decoded element by element; scales are read once for the columns that share them.
Names as in `device.py`; i_n: int64 [R, 1], i_k0: a multiple of C, b_row: bool [R, 1].
"""

from __future__ import annotations

import triton
import triton.language as tl

# of NESTED, which for integers by group says which parts there are
ZEROS: tl.constexpr = tl.constexpr(1)
INDEX: tl.constexpr = tl.constexpr(2)
SHIFTS: tl.constexpr = tl.constexpr(4)


@triton.jit
def byte_at(p, b_mask):
    """int32, whatever lies where no bit of the mask is set: 0."""
    return tl.load(p, mask=b_mask, other=0).to(tl.int32)


@triton.jit
def half_at(p, b_mask):
    """float32 of the float16 in two bytes: blocks may begin at an odd address."""
    b_bits = byte_at(p, b_mask) | (byte_at(p + 1, b_mask) << 8)
    return b_bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def signed(b_byte):
    """float32 of int32 0 .. 255 as an int8."""
    return (b_byte - ((b_byte & 128) << 1)).to(tl.float32)


@triton.jit
def parts_of(i_k0, C: tl.constexpr, SIZE: tl.constexpr):
    """int [1, C / SIZE or 1]: which parts of SIZE columns a tile's columns are in; one of them divides the other."""
    COUNT: tl.constexpr = C // SIZE if C > SIZE else 1
    return (i_k0 // SIZE + tl.arange(0, COUNT))[None, :]


@triton.jit
def spread(b, R: tl.constexpr, C: tl.constexpr):
    """[R, C] from [R, parts]."""
    COUNT: tl.constexpr = b.shape[1]
    return tl.reshape(tl.broadcast_to(b[:, :, None], (R, COUNT, C // COUNT)), (R, C))


@triton.jit
def group_values(p, i_n, i_k0, i_g, b_in, G, R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, BY: tl.constexpr):
    """float32 [R, C] out of p [rows, G], one a group: by parts where a tile has whole ones, else by i_g [.., C]."""
    if BY:
        i_p = parts_of(i_k0, C, GROUP)
        # a tile's last part may be of no group; b_in there: [R, 1]
        b_v = spread(tl.load(p + i_n * G + i_p, mask=b_in & (i_p < G), other=0.0).to(tl.float32), R, C)
    else:
        b_v = tl.load(p + i_n * G + i_g, mask=b_in, other=0.0).to(tl.float32)
    return b_v


@triton.jit
def affine(
    p_w, p_scales, p_zeros, p_index, p_shifts, i_n, i_k0, b_row, b_mask, K, R: tl.constexpr, C: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Integers by group: (code - zero) * scale + shift. PARTS: those of ZEROS, INDEX and SHIFTS that there are.

    A column of a group that there is not (an index that was overwritten) is NaN.
    """
    i_k = i_k0 + tl.arange(0, C)[None, :]
    i_e = i_n * K + i_k
    if FORMAT == 3:
        b_code = ((byte_at(p_w + (i_e >> 1), b_mask) >> (4 - 4 * (i_e & 1).to(tl.int32))) & 15).to(tl.float32)
    elif FORMAT == 4:
        b_code = signed(byte_at(p_w + i_e, b_mask))
    else:
        b_code = byte_at(p_w + i_e, b_mask).to(tl.float32)
    G = tl.cdiv(K, GROUP)
    BY: tl.constexpr = PARTS & 2 == 0 and (C % GROUP == 0 or GROUP % C == 0)
    b_in = b_row if BY else b_mask
    i_g = i_k // GROUP
    if PARTS & 2:
        i_g = tl.load(p_index + i_k, mask=i_k < K, other=0)
        b_known = (i_g >= 0) & (i_g < G)
        b_in = b_mask & b_known
    if PARTS & 1:
        b_code -= group_values(p_zeros, i_n, i_k0, i_g, b_in, G, R, C, GROUP, BY)
    elif FORMAT == 3:
        b_code -= 8.0
    elif FORMAT == 5:
        b_code -= 128.0
    b_w = b_code * group_values(p_scales, i_n, i_k0, i_g, b_in, G, R, C, GROUP, BY)
    if PARTS & 4:
        b_w += group_values(p_shifts, i_n, i_k0, i_g, b_in, G, R, C, GROUP, BY)
    if PARTS & 2:
        b_w = tl.where(b_known, b_w, float("nan"))
    return b_w


@triton.jit
def simple_blocks(
    p_w, p_table, i_n, i_k0, b_row, b_mask, K, R: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """GGUF's blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (numbers 6 to 10), IQ4_NL and MXFP4 (14, 15).

    p_table: the 16 values of the last two.
    """
    FIVE: tl.constexpr = FORMAT == 8 or FORMAT == 9
    ONE: tl.constexpr = FORMAT == 7 or FORMAT == 9  # with a minimum
    FIRST: tl.constexpr = 1 if FORMAT == 15 else 4 if ONE else 2  # byte of what comes after scales
    SIZE: tl.constexpr = 34 if FORMAT == 10 else FIRST + 16 + (4 if FIVE else 0)
    CODES: tl.constexpr = FIRST + (4 if FIVE else 0)
    i_k = i_k0 + tl.arange(0, C)[None, :]
    i_in = i_k % 32
    p_block = p_w + (i_n * (K // 32) + i_k // 32) * SIZE
    i_b = parts_of(i_k0, C, 32)
    b_has = b_row & (i_b < K // 32)
    p_scale = p_w + (i_n * (K // 32) + i_b) * SIZE
    if FORMAT == 15:
        b_e = byte_at(p_scale, b_has)
        b_d = tl.where(b_e < 2, (b_e + 1) << 21, (b_e - 1) << 23).to(tl.float32, bitcast=True)
    else:
        b_d = half_at(p_scale, b_has)
    b_d = spread(b_d, R, C)
    if FORMAT == 10:
        b_w = b_d * signed(byte_at(p_block + 2 + i_in, b_mask))
    else:
        b_code = (byte_at(p_block + CODES + i_in % 16, b_mask) >> (i_in // 16 * 4)) & 15
        if FIVE:
            b_code |= ((byte_at(p_block + FIRST + i_in // 8, b_mask) >> (i_in % 8)) & 1) << 4
        if FORMAT == 14 or FORMAT == 15:
            b_value = tl.load(p_table + b_code)
        elif FORMAT == 6:
            b_value = (b_code - 8).to(tl.float32)
        elif FORMAT == 8:
            b_value = (b_code - 16).to(tl.float32)
        else:
            b_value = b_code.to(tl.float32)
        b_w = b_d * b_value
        if ONE:
            b_w += spread(half_at(p_scale + 2, b_has), R, C)
    return b_w


@triton.jit
def k_quants(p_w, i_n, i_k0, b_row, b_mask, K, R: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr):
    """GGUF's blocks of 256 with scales of their parts: Q4_K, Q5_K, Q6_K (numbers 11 to 13)."""
    SIZE: tl.constexpr = 144 if FORMAT == 11 else 176 if FORMAT == 12 else 210
    PART: tl.constexpr = 16 if FORMAT == 13 else 32
    i_k = i_k0 + tl.arange(0, C)[None, :]
    i_in = i_k % 256
    p_block = p_w + (i_n * (K // 256) + i_k // 256) * SIZE
    i_p = parts_of(i_k0, C, PART)
    b_has = b_row & (i_p < K // PART)
    p_own = p_w + (i_n * (K // 256) + i_p // (256 // PART)) * SIZE
    i_s = i_p % (256 // PART)
    if FORMAT == 13:
        b_code = (byte_at(p_block + i_in // 128 * 64 + i_in % 64, b_mask) >> (i_in % 128 // 64 * 4)) & 15
        b_upper = byte_at(p_block + 128 + i_in // 128 * 32 + i_in % 32, b_mask) >> (i_in % 128 // 32 * 2)
        b_scale = half_at(p_own + 208, b_has) * signed(byte_at(p_own + 192 + i_s, b_has))
        b_w = spread(b_scale, R, C) * ((b_code | ((b_upper & 3) << 4)) - 32).to(tl.float32)
    else:
        CODES: tl.constexpr = 16 if FORMAT == 11 else 48
        b_code = (byte_at(p_block + CODES + i_in // 64 * 32 + i_in % 32, b_mask) >> (i_in % 64 // 32 * 4)) & 15
        if FORMAT == 12:
            b_code |= ((byte_at(p_block + 16 + i_in % 32, b_mask) >> (i_in // 32)) & 1) << 4
        # six bits each: the first four of scales and minimums lie whole, of the others four bits and two
        b_scale, b_least = byte_at(p_own + 4 + i_s % 4, b_has), byte_at(p_own + 8 + i_s % 4, b_has)
        b_mixed = byte_at(p_own + 12 + i_s % 4, b_has)
        b_scale = tl.where(i_s < 4, b_scale & 63, (b_mixed & 15) | ((b_scale >> 2) & 48))
        b_least = tl.where(i_s < 4, b_least & 63, (b_mixed >> 4) | ((b_least >> 2) & 48))
        b_d = half_at(p_own, b_has) * b_scale.to(tl.float32)
        b_m = half_at(p_own + 2, b_has) * b_least.to(tl.float32)
        b_w = spread(b_d, R, C) * b_code.to(tl.float32) - spread(b_m, R, C)
    return b_w


@triton.jit
def decode(
    p_w, p_absmax, p_nested, p_code, p_offset, p_table, i_n, i_k0, b_row, b_mask, K, R: tl.constexpr, C: tl.constexpr,
    FORMAT: tl.constexpr, BLOCKSIZE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """float32 [R, C], zero outside of the mask: a tile of a weight in the format of this number."""
    if FORMAT <= 5:
        b_w = affine(p_w, p_absmax, p_nested, p_code, p_offset, i_n, i_k0, b_row, b_mask, K, R, C, FORMAT, BLOCKSIZE,
                     PARTS)  # fmt: skip
    elif FORMAT <= 10 or FORMAT >= 14:
        b_w = simple_blocks(p_w, p_table, i_n, i_k0, b_row, b_mask, K, R, C, FORMAT)
    else:
        b_w = k_quants(p_w, i_n, i_k0, b_row, b_mask, K, R, C, FORMAT)
    return tl.where(b_mask, b_w, 0.0)
