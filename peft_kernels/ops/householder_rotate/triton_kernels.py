"""Triton kernels of householder_rotate. Imported only when one is launched."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import addends, dot, dot_three, dot_wide, round_to, wide_sum


@triton.jit
def _vectors(p, i_r, i_n, r, d):
    """float32 [BR, BN] of u or v [r, d]."""
    b_in = (i_r < r)[:, None] & (i_n < d)[None, :]
    return tl.load(p + i_r.to(tl.int64)[:, None] * d + i_n[None, :], mask=b_in, other=0.0).to(tl.float32)


@triton.jit
def update_kernel(
    p_x, p_u, p_v, p_y, p_s, M, d, r, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr
):
    """s = x u^T; y = x - s v. PRECISION: of the second product, whose sum is rounded to x's type."""
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_r = tl.arange(0, BR)
    i_row = i_m.to(tl.int64)[:, None] * d
    TIMES: tl.constexpr = addends(p_x.dtype.element_ty, tl.float32)
    b_acc = tl.zeros((BM, BR * TIMES), tl.float32)
    for i_n0 in range(0, d, BN):
        i_n = i_n0 + tl.arange(0, BN)
        b_x = tl.load(p_x + i_row + i_n[None, :], mask=(i_m < M)[:, None] & (i_n < d)[None, :], other=0.0)
        b_acc = dot_wide(b_x, tl.trans(_vectors(p_u, i_r, i_n, r, d)), b_acc)
    b_s = wide_sum(b_acc, TIMES)
    tl.store(p_s + i_m.to(tl.int64)[:, None] * r + i_r[None, :], b_s, mask=(i_m < M)[:, None] & (i_r < r)[None, :])
    for i_n0 in range(0, d, BN):
        i_n = i_n0 + tl.arange(0, BN)
        b_in = (i_m < M)[:, None] & (i_n < d)[None, :]
        b_x = tl.load(p_x + i_row + i_n[None, :], mask=b_in, other=0.0).to(tl.float32)
        b_v = _vectors(p_v, i_r, i_n, r, d)
        if PRECISION == "tf32x3":
            b_y = b_x - dot_three(b_s, b_v, tl.zeros((BM, BN), tl.float32))
        else:
            b_y = dot(-b_s, b_v, b_x, PRECISION)
        tl.store(p_y + i_row + i_n[None, :], round_to(b_y, p_y.dtype.element_ty), mask=b_in)


@triton.jit
def gradient_kernel(
    p_t, p_x, p_out, M, d, r, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """out[part] = -t^T x over a part of the rows."""
    i_part = tl.program_id(0)
    i_n = tl.program_id(1) * BN + tl.arange(0, BN)
    i_r = tl.arange(0, BR)
    TIMES: tl.constexpr = addends(p_x.dtype.element_ty, p_t.dtype.element_ty)
    b_acc = tl.zeros((BN, BR * TIMES), tl.float32)
    for i_m0 in range(i_part * SPLIT, tl.minimum((i_part + 1) * SPLIT, M), BM):
        i_m = i_m0 + tl.arange(0, BM)
        i_row = i_m.to(tl.int64)[:, None]
        b_x = tl.load(p_x + i_row * d + i_n[None, :], mask=(i_m < M)[:, None] & (i_n < d)[None, :], other=0.0)
        b_t = tl.load(p_t + i_row * r + i_r[None, :], mask=(i_m < M)[:, None] & (i_r < r)[None, :], other=0.0)
        b_acc = dot_wide(tl.trans(b_x), b_t, b_acc)
    p_to = p_out + (i_part.to(tl.int64) * r + i_r[None, :]) * d + i_n[:, None]
    tl.store(p_to, -wide_sum(b_acc, TIMES), mask=(i_r < r)[None, :] & (i_n < d)[:, None])
