"""Triton kernels of lora_shrink and lora_expand. Imported only when one is launched; the host side is `triton.py`.

The slices of a layer come as tuples, an entry each. A tile has rows of one adapter, cut from `order` as in
multi_lora_linear; what it writes is its own, so no sum depends on an order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import addends, dot_short, dot_wide, round_to, wide_sum
from ..lora_linear.triton_kernels import project_rows
from ..multi_lora_linear.triton_kernels import group_tile


@triton.jit(do_not_specialize=["M", "S", "steps", "scale"])
def shrink_kernel(
    p_x, p_a, p_s, p_order, p_bounds, M, K, r, S, steps, scale, tiles,
    COUNT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Part i_part (`steps` tiles of BK columns) of s [COUNT, parts, M, r], zero in rows without an adapter.

    tiles: of BR ranks; those of the first slice, then those of the second, and so on.
    """
    i_slot, i_first, i_last = group_tile(p_bounds, tl.program_id(0), BM, S)
    if i_first < i_last:
        i_slice = tl.program_id(1) // tiles
        i_part = tl.program_id(2)
        i_m = i_first + tl.arange(0, BM)
        b_row = tl.load(p_order + i_m, mask=i_m < i_last, other=M)
        b_in = b_row < M  # of a batch there may be more rows than x has
        i_r = tl.program_id(1) % tiles * BR + tl.arange(0, BR)
        i_end = tl.where(i_slot < S, tl.minimum(tl.cdiv(K, BK), (i_part + 1) * steps), 0)
        i_out = ((i_slice * tl.num_programs(2) + i_part).to(tl.int64) * M + b_row.to(tl.int64))[:, None] * r
        i_out += i_r[None, :]
        for i in tl.static_range(COUNT):
            if i_slice == i:
                p_own = p_a[i] + i_slot.to(tl.int64) * r * K
                b_s = project_rows(p_x, p_own, p_x, b_row, b_in, i_r, i_part * steps, i_end, K, r, 0, 1.0, False, False,
                                   BM, BK, BR)  # fmt: skip
                tl.store(p_s + i_out, tl.where(i_slot < S, b_s * scale, 0.0), mask=b_in[:, None] & (i_r < r)[None, :])


@triton.jit
def expand_tile(
    p_y, p_s, p_b, b_row, b_in, i_n, width, M, r, stride_s, parts,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Columns i_n [BN] of a slice in rows b_row [BM] of y: += s B^T; p_y: [BN, BM] places, p_b: the adapter's."""
    WIDE: tl.constexpr = p_y.dtype.element_ty == tl.float32 or p_b.dtype.element_ty == tl.float32
    TIMES: tl.constexpr = addends(p_b.dtype.element_ty, tl.float32) if WIDE else 1
    b_acc = tl.zeros((BN, BM * TIMES), tl.float32)
    b_columns = (i_n < width)[:, None]
    for i_r0 in tl.range(0, r, BR, num_stages=1):
        i_r = i_r0 + tl.arange(0, BR)
        p_own = p_b + i_n.to(tl.int64)[:, None] * r + i_r[None, :]
        b_b = tl.load(p_own, mask=b_columns & (i_r < r)[None, :], other=0.0)
        b_own = b_in[None, :] & (i_r < r)[:, None]
        p_low = p_s + b_row.to(tl.int64)[None, :] * r + i_r[:, None]
        b_s = tl.zeros((BR, BM), tl.float32)
        for i_part in range(parts):
            b_s += tl.load(p_low + i_part * stride_s, mask=b_own, other=0.0).to(tl.float32)
        if WIDE:
            b_acc = dot_wide(b_b, b_s, b_acc)
        else:
            b_acc += dot_short(b_b, b_s, tl.zeros((BN, BM), tl.float32))
    b_acc = wide_sum(b_acc, TIMES)
    b_in = b_columns & b_in[None, :]
    if ADD:
        b_acc += tl.load(p_y, mask=b_in, other=0.0).to(tl.float32)
    tl.store(p_y, round_to(b_acc, p_y.dtype.element_ty), mask=b_in)


@triton.jit(do_not_specialize=["M", "S", "parts"])
def expand_kernel(
    p_y, p_s, p_b, p_order, p_bounds, N, widths, offsets, M, r, S, stride_y, stride_s, parts,
    COUNT: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[rows, offset_i + n] += s_i[rows] B_i[n]^T: tiles of BN columns of the first slice, then of the second, ...

    N: features of each slice in b; widths: those of them that y has.
    """
    i_slot, i_first, i_last = group_tile(p_bounds, tl.program_id(0), BM, S)
    if (i_first < i_last) & (i_slot < S):
        i_m = i_first + tl.arange(0, BM)
        b_row = tl.load(p_order + i_m, mask=i_m < i_last, other=M)
        b_in = b_row < M
        p_rows = p_y + b_row.to(tl.int64)[None, :] * stride_y
        i_tile = tl.program_id(1)
        for i in tl.static_range(COUNT):
            tiles = tl.cdiv(widths[i], BN)
            if (i_tile >= 0) & (i_tile < tiles):
                i_n = i_tile * BN + tl.arange(0, BN)
                expand_tile(p_rows + (offsets[i] + i_n)[:, None], p_s[i], p_b[i] + i_slot.to(tl.int64) * N[i] * r,
                            b_row, b_in, i_n, widths[i], M, r, stride_s, parts, ADD, BM, BN, BR)  # fmt: skip
            i_tile -= tiles
