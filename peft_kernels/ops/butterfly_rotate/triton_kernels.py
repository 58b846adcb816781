"""Triton kernels of butterfly_rotate. Imported only when one is launched.

A tile holds SEVERAL groups of SIZE features side by side; its matrix has their blocks on the diagonal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import addends, dot_wide, round_to, wide_sum


@triton.jit
def rotate_kernel(
    p_x, p_r, p_y, M, d, groups, SIZE: tl.constexpr, SEVERAL: tl.constexpr, SHARED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[m, group] = x[m, group] R[group]; R float32 [groups or 1, SIZE, SIZE]."""
    WIDE: tl.constexpr = SEVERAL * SIZE
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_first = tl.program_id(1) * SEVERAL
    i_c = tl.program_id(2) * BN + tl.arange(0, BN)
    b_live = (i_c < WIDE) & (i_first + i_c // SIZE < groups)
    i_row = i_m.to(tl.int64)[:, None] * d + i_first * SIZE
    TIMES: tl.constexpr = addends(p_x.dtype.element_ty, p_r.dtype.element_ty)
    b_acc = tl.zeros((BM, BN * TIMES), tl.float32)
    for i_k0 in range(0, WIDE, BK):
        i_k = i_k0 + tl.arange(0, BK)
        b_in = (i_k < WIDE) & (i_first + i_k // SIZE < groups)
        b_x = tl.load(p_x + i_row + i_k[None, :], mask=(i_m < M)[:, None] & b_in[None, :], other=0.0)
        i_block = 0 if SHARED else (i_first + i_k // SIZE).to(tl.int64)[:, None] * (SIZE * SIZE)
        b_same = (i_k // SIZE)[:, None] == (i_c // SIZE)[None, :]
        p_block = p_r + i_block + (i_k % SIZE)[:, None] * SIZE + (i_c % SIZE)[None, :]
        b_r = tl.load(p_block, mask=b_same & b_in[:, None] & b_live[None, :], other=0.0)
        b_acc = dot_wide(b_x, b_r, b_acc)
    b_out = (i_m < M)[:, None] & b_live[None, :]
    tl.store(p_y + i_row + i_c[None, :], round_to(wide_sum(b_acc, TIMES), p_y.dtype.element_ty), mask=b_out)


@triton.jit
def gradient_kernel(
    p_x, p_dy, p_out, M, d, groups, SIZE: tl.constexpr, SEVERAL: tl.constexpr, ACROSS: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out[part, group, k, c] = sum of x[m, k] dy[m, c] over a part of the rows; BT x BT of a tile's products."""
    WIDE: tl.constexpr = SEVERAL * SIZE
    i_part = tl.program_id(0)
    i_first = tl.program_id(1) * SEVERAL
    i_k = tl.program_id(2) // ACROSS * BT + tl.arange(0, BT)
    i_c = tl.program_id(2) % ACROSS * BT + tl.arange(0, BT)
    b_k = (i_k < WIDE) & (i_first + i_k // SIZE < groups)
    b_c = (i_c < WIDE) & (i_first + i_c // SIZE < groups)
    TIMES: tl.constexpr = addends(p_x.dtype.element_ty, p_dy.dtype.element_ty)
    b_acc = tl.zeros((BT, BT * TIMES), tl.float32)
    for i_m0 in range(i_part * SPLIT, tl.minimum((i_part + 1) * SPLIT, M), BM):
        i_m = i_m0 + tl.arange(0, BM)
        i_row = i_m.to(tl.int64)[:, None] * d + i_first * SIZE
        b_m = (i_m < M)[:, None]
        b_x = tl.load(p_x + i_row + i_k[None, :], mask=b_m & b_k[None, :], other=0.0)
        b_g = tl.load(p_dy + i_row + i_c[None, :], mask=b_m & b_c[None, :], other=0.0)
        b_acc = dot_wide(tl.trans(b_x), b_g, b_acc)
    b_same = (i_k // SIZE)[:, None] == (i_c // SIZE)[None, :]
    i_out = (i_part.to(tl.int64) * groups + i_first + i_k // SIZE)[:, None] * (SIZE * SIZE)
    p_to = p_out + i_out + (i_k % SIZE)[:, None] * SIZE + (i_c % SIZE)[None, :]
    tl.store(p_to, wide_sum(b_acc, TIMES), mask=b_same & b_k[:, None] & b_c[None, :])
