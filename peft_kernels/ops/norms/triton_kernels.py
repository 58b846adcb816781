"""Triton kernels of rms_norm and layer_norm. Imported only when one is launched.

A program has R rows of x, each whole. Row r of x begins at r // inner * outer_row + r % inner * inner_row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import round_to


@triton.jit
def row_starts(i_r, inner, inner_row, outer_row):
    i_r = i_r.to(tl.int64)
    return i_r // inner * outer_row + i_r % inner * inner_row


@triton.jit
def moments(b_x, b_in, N, eps, CENTRED: tl.constexpr):
    """(x less its mean, that mean [R], 1 / sqrt(mean of squares + eps) [R])."""
    b_mean = tl.zeros([b_x.shape[0]], tl.float32)
    if CENTRED:
        b_mean = tl.sum(b_x, 1) / N
        b_x = tl.where(b_in, b_x - b_mean[:, None], 0.0)
    return b_x, b_mean, 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 1) / N + eps)


@triton.jit
def norm_kernel(
    p_x, p_weight, p_bias, p_y, rows, N, inner, inner_row, outer_row, eps, offset,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    i_r = tl.program_id(0) * R + tl.arange(0, R)
    b_in = (i_r < rows)[:, None] & (i < N)[None, :]
    p_row = p_x + row_starts(i_r, inner, inner_row, outer_row)[:, None] + i[None, :]
    b_x = tl.load(p_row, mask=b_in, other=0.0).to(tl.float32)
    b_x, _, b_inverse = moments(b_x, b_in, N, eps, CENTRED)
    b_y = b_x * b_inverse[:, None]
    if HAS_WEIGHT:
        b_y = b_y * (tl.load(p_weight + i, mask=i < N, other=0.0).to(tl.float32) + offset)[None, :]
    if HAS_BIAS:
        b_y = b_y + tl.load(p_bias + i, mask=i < N, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + i_r.to(tl.int64)[:, None] * N + i[None, :], round_to(b_y, p_y.dtype.element_ty), mask=b_in)


@triton.jit
def norm_backward_kernel(
    p_dy, p_x, p_weight, p_dx, p_stats, rows, N, inner, inner_row, outer_row, eps, offset,
    HAS_WEIGHT: tl.constexpr, NEED_DX: tl.constexpr, NEED_STATS: tl.constexpr, CENTRED: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    i_r = tl.program_id(0) * R + tl.arange(0, R)
    b_in = (i_r < rows)[:, None] & (i < N)[None, :]
    p_row = p_x + row_starts(i_r, inner, inner_row, outer_row)[:, None] + i[None, :]
    b_x = tl.load(p_row, mask=b_in, other=0.0).to(tl.float32)
    b_x, b_mean, b_inverse = moments(b_x, b_in, N, eps, CENTRED)
    if NEED_STATS:
        tl.store(p_stats + i_r * 2, b_mean, mask=i_r < rows)
        tl.store(p_stats + i_r * 2 + 1, b_inverse, mask=i_r < rows)
    if NEED_DX:
        i_out = i_r.to(tl.int64)[:, None] * N + i[None, :]
        b_g = tl.load(p_dy + i_out, mask=b_in, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            b_g = b_g * (tl.load(p_weight + i, mask=i < N, other=0.0).to(tl.float32) + offset)[None, :]
        b_along = tl.sum(b_g * b_x, 1) / N * b_inverse * b_inverse
        if CENTRED:
            b_g = b_g - (tl.sum(b_g, 1) / N)[:, None]
        b_dx = (b_g - b_x * b_along[:, None]) * b_inverse[:, None]
        tl.store(p_dx + i_out, round_to(b_dx, p_dx.dtype.element_ty), mask=b_in)


@triton.jit
def sums_kernel(
    p_dy, p_x, p_stats, p_sums, rows, N, inner, inner_row, outer_row, parts, R: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of dy (x - mean) c and of dy over the tiles of rows part, part + parts, ...: p_sums [parts, 2, N]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    b_w = tl.zeros((BLOCK,), tl.float32)
    b_b = tl.zeros((BLOCK,), tl.float32)
    for i_r0 in tl.range(part * R, rows, parts * R, num_stages=1):
        i_r = i_r0 + tl.arange(0, R)
        b_in = (i_r < rows)[:, None] & (i < N)[None, :]
        b_mean = tl.load(p_stats + i_r * 2, mask=i_r < rows, other=0.0)
        b_inverse = tl.load(p_stats + i_r * 2 + 1, mask=i_r < rows, other=0.0)
        b_d = tl.load(p_dy + i_r.to(tl.int64)[:, None] * N + i[None, :], mask=b_in, other=0.0).to(tl.float32)
        p_row = p_x + row_starts(i_r, inner, inner_row, outer_row)[:, None] + i[None, :]
        b_x = tl.load(p_row, mask=b_in, other=0.0).to(tl.float32)
        b_w += tl.sum(b_d * (b_x - b_mean[:, None]) * b_inverse[:, None], 0)
        b_b += tl.sum(b_d, 0)
    tl.store(p_sums + part * 2 * N + i, b_w, mask=i < N)
    tl.store(p_sums + part * 2 * N + N + i, b_b, mask=i < N)
