"""Triton kernels of pair_rotate. Imported only when one is launched. Pair p has its features at a and a + half."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import round_to


@triton.jit
def _pairs(d, half, BN: tl.constexpr):
    i_pair = tl.program_id(1) * BN + tl.arange(0, BN)
    return i_pair // half * (2 * half) + i_pair % half, i_pair < d // 2


@triton.jit
def pair_kernel(p_x, p_first, p_second, p_y, M, d, half, BACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y_a = a f_a - b s_a, y_b = b f_b + a s_b; BACK: the transpose."""
    i_a, b_n = _pairs(d, half, BN)
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_at = i_m.to(tl.int64)[:, None] * d + i_a[None, :]
    b_in = (i_m < M)[:, None] & b_n[None, :]
    b_a = tl.load(p_x + i_at, mask=b_in, other=0.0).to(tl.float32)
    b_b = tl.load(p_x + i_at + half, mask=b_in, other=0.0).to(tl.float32)
    b_fa = tl.load(p_first + i_a, mask=b_n, other=0.0).to(tl.float32)[None, :]
    b_fb = tl.load(p_first + i_a + half, mask=b_n, other=0.0).to(tl.float32)[None, :]
    b_sa = tl.load(p_second + i_a, mask=b_n, other=0.0).to(tl.float32)[None, :]
    b_sb = tl.load(p_second + i_a + half, mask=b_n, other=0.0).to(tl.float32)[None, :]
    if BACK:
        b_ya = b_a * b_fa + b_b * b_sb
        b_yb = b_b * b_fb - b_a * b_sa
    else:
        b_ya = b_a * b_fa - b_b * b_sa
        b_yb = b_b * b_fb + b_a * b_sb
    tl.store(p_y + i_at, round_to(b_ya, p_y.dtype.element_ty), mask=b_in)
    tl.store(p_y + i_at + half, round_to(b_yb, p_y.dtype.element_ty), mask=b_in)


@triton.jit
def pair_gradient_kernel(p_dy, p_x, p_sums, M, d, half, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """sums[part] = (dfirst, dsecond) [2, d] of a part of the rows."""
    i_part = tl.program_id(0)
    i_a, b_n = _pairs(d, half, BN)
    b_fa = tl.zeros((BM, BN), tl.float32)
    b_fb = tl.zeros((BM, BN), tl.float32)
    b_sa = tl.zeros((BM, BN), tl.float32)
    b_sb = tl.zeros((BM, BN), tl.float32)
    for i_m0 in range(i_part * SPLIT, tl.minimum((i_part + 1) * SPLIT, M), BM):
        i_m = i_m0 + tl.arange(0, BM)
        i_at = i_m.to(tl.int64)[:, None] * d + i_a[None, :]
        b_in = (i_m < M)[:, None] & b_n[None, :]
        b_a = tl.load(p_x + i_at, mask=b_in, other=0.0).to(tl.float32)
        b_b = tl.load(p_x + i_at + half, mask=b_in, other=0.0).to(tl.float32)
        b_ga = tl.load(p_dy + i_at, mask=b_in, other=0.0).to(tl.float32)
        b_gb = tl.load(p_dy + i_at + half, mask=b_in, other=0.0).to(tl.float32)
        b_fa += b_ga * b_a
        b_fb += b_gb * b_b
        b_sa -= b_ga * b_b
        b_sb += b_gb * b_a
    p_first = p_sums + i_part.to(tl.int64) * 2 * d + i_a
    tl.store(p_first, tl.sum(b_fa, 0), mask=b_n)
    tl.store(p_first + half, tl.sum(b_fb, 0), mask=b_n)
    tl.store(p_first + d, tl.sum(b_sa, 0), mask=b_n)
    tl.store(p_first + d + half, tl.sum(b_sb, 0), mask=b_n)
