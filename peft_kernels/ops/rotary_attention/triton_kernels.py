"""Triton kernels of rotary_attention. Imported only when one is launched.

A head's two halves, which the rotation pairs, are tiles of their own: [tokens, H / 2] each, H padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import dot, round_to


@triton.jit
def halves(p, i_row, i_d, mask, half):
    """Both halves of rows at element offsets i_row, in float32."""
    p_first = p + i_row[:, None] + i_d[None, :]
    return (
        tl.load(p_first, mask=mask, other=0.0).to(tl.float32),
        tl.load(p_first + half, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def turned(p_x, p_cos, p_sin, i_x, i_angle, i_d, mask, half, DTYPE: tl.constexpr):
    """Both halves of rows of x, turned by their angles and rounded."""
    b_1, b_2 = halves(p_x, i_x, i_d, mask, half)
    b_cos_1, b_cos_2 = halves(p_cos, i_angle, i_d, mask, half)
    b_sin_1, b_sin_2 = halves(p_sin, i_angle, i_d, mask, half)
    return round_to(b_1 * b_cos_1 - b_2 * b_sin_1, DTYPE), round_to(b_2 * b_cos_2 + b_1 * b_sin_2, DTYPE)


@triton.jit
def store_turned_back(p_dx, p_cos, p_sin, i_x, i_angle, i_d, mask, half, b_1, b_2):
    b_cos_1, b_cos_2 = halves(p_cos, i_angle, i_d, mask, half)
    b_sin_1, b_sin_2 = halves(p_sin, i_angle, i_d, mask, half)
    p_first = p_dx + i_x[:, None] + i_d[None, :]
    tl.store(p_first, round_to(b_1 * b_cos_1 + b_2 * b_sin_2, p_dx.dtype.element_ty), mask=mask)
    tl.store(p_first + half, round_to(b_2 * b_cos_2 - b_1 * b_sin_1, p_dx.dtype.element_ty), mask=mask)


@triton.jit
def visible(p_keep, i_q, i_k, T, MASKED: tl.constexpr):
    """bool of the shape of i_q and i_k together: which of the queries see which of the keys."""
    b_seen = (i_q < T) & (i_k < T)
    if MASKED:
        b_seen = b_seen & (tl.load(p_keep + i_q.to(tl.int64) * T + i_k, mask=b_seen, other=0) != 0)
    else:
        b_seen = b_seen & (i_q >= i_k)
    return b_seen


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_keep, p_y, p_lse, T, H, G, D, angles, masks, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y and lse of BM queries of a head. angles, masks: elements from a row of the batch to the next, or 0."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    half = D // 2
    i_head = tl.program_id(1) % H
    i_batch = (tl.program_id(1) // H).to(tl.int64)
    # offsets within a row of the batch are 32 bits wide: wider ones take the registers of the tiles
    queries, keys = i_batch * T * H * D, i_batch * T * G * D
    p_q, p_k, p_v, p_keep = p_q + queries, p_k + keys, p_v + keys, p_keep + i_batch * masks
    p_cos, p_sin, p_lse = p_cos + i_batch * angles, p_sin + i_batch * angles, p_lse + i_batch * H * T
    p_y += queries
    i_group = i_head // (H // G)
    i_q = tl.program_id(0) * BM + tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    b_in = (i_q < T)[:, None] & (i_d < half)[None, :]
    i_x = (i_q * H + i_head) * D
    b_q1, b_q2 = turned(p_q, p_cos, p_sin, i_x, i_q * D, i_d, b_in, half, DTYPE)
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_y1 = tl.zeros((BM, BD), tl.float32)
    b_y2 = tl.zeros((BM, BD), tl.float32)
    end = T
    if not MASKED:
        end = tl.minimum(T, (tl.program_id(0) + 1) * BM)
    for i_k0 in tl.range(0, end, BN, num_stages=1):
        i_k = i_k0 + tl.arange(0, BN)
        b_k_in = (i_k < T)[:, None] & (i_d < half)[None, :]
        i_z = (i_k * G + i_group) * D
        b_k1, b_k2 = turned(p_k, p_cos, p_sin, i_z, i_k * D, i_d, b_k_in, half, DTYPE)
        b_s = product(b_q1, b_q2, b_k1, b_k2, BM, BN, PRECISION) * scale
        b_s = tl.where(visible(p_keep, i_q[:, None], i_k[None, :], T, MASKED), b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp(b_s - b_base[:, None])
        b_shrink = tl.exp(b_top - b_base)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v1, b_v2 = halves(p_v, i_z, i_d, b_k_in, half)
        b_p = round_to(b_p, DTYPE)
        b_y1 = dot(b_p, b_v1.to(DTYPE), b_y1 * b_shrink[:, None], PRECISION)
        b_y2 = dot(b_p, b_v2.to(DTYPE), b_y2 * b_shrink[:, None], PRECISION)
        b_top = b_new
    b_none = b_sum == 0.0  # sees nothing
    b_inverse = tl.where(b_none, 0.0, 1.0 / tl.where(b_none, 1.0, b_sum))[:, None]
    b_lse = tl.where(b_none, float("inf"), b_top + tl.log(tl.where(b_none, 1.0, b_sum)))
    tl.store(p_lse + i_head * T + i_q, b_lse, mask=i_q < T)
    p_first = p_y + i_x[:, None] + i_d[None, :]
    tl.store(p_first, round_to(b_y1 * b_inverse, DTYPE), mask=b_in)
    tl.store(p_first + half, round_to(b_y2 * b_inverse, DTYPE), mask=b_in)


@triton.jit
def product(b_x1, b_x2, b_z1, b_z2, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """x z^T [M, N] of rows in halves."""
    b_zero = tl.zeros((M, N), tl.float32)
    return dot(b_x1, tl.trans(b_z1), b_zero, PRECISION, True) + dot(b_x2, tl.trans(b_z2), b_zero, PRECISION, True)


@triton.jit
def queries_kernel(
    p_dy, p_q, p_k, p_v, p_cos, p_sin, p_keep, p_lse, p_dq, p_along, T, H, G, D, angles, masks, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of a head, and along [B, H, T]: sum of p dp over the keys, in a first pass over them."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    half = D // 2
    i_head = tl.program_id(1) % H
    i_batch = (tl.program_id(1) // H).to(tl.int64)
    # offsets within a row of the batch are 32 bits wide: wider ones take the registers of the tiles
    queries, keys = i_batch * T * H * D, i_batch * T * G * D
    p_q, p_k, p_v, p_keep = p_q + queries, p_k + keys, p_v + keys, p_keep + i_batch * masks
    p_cos, p_sin, p_lse = p_cos + i_batch * angles, p_sin + i_batch * angles, p_lse + i_batch * H * T
    p_dy, p_dq, p_along = p_dy + queries, p_dq + queries, p_along + i_batch * H * T
    i_group = i_head // (H // G)
    i_q = tl.program_id(0) * BM + tl.arange(0, BM)
    i_d = tl.arange(0, BD)
    b_in = (i_q < T)[:, None] & (i_d < half)[None, :]
    i_x = (i_q * H + i_head) * D
    b_q1, b_q2 = turned(p_q, p_cos, p_sin, i_x, i_q * D, i_d, b_in, half, DTYPE)
    b_dy1, b_dy2 = halves(p_dy, i_x, i_d, b_in, half)
    b_dy1, b_dy2 = b_dy1.to(DTYPE), b_dy2.to(DTYPE)
    i_lse = i_head * T + i_q
    b_lse = tl.load(p_lse + i_lse, mask=i_q < T, other=float("inf"))
    b_along = tl.zeros((BM,), tl.float32)
    b_dq1 = tl.zeros((BM, BD), tl.float32)
    b_dq2 = tl.zeros((BM, BD), tl.float32)
    end = T
    if not MASKED:
        end = tl.minimum(T, (tl.program_id(0) + 1) * BM)
    blocks = tl.cdiv(end, BN)
    for i in tl.range(0, 2 * blocks, num_stages=1):
        i_k = i % blocks * BN + tl.arange(0, BN)
        b_k_in = (i_k < T)[:, None] & (i_d < half)[None, :]
        i_z = (i_k * G + i_group) * D
        b_k1, b_k2 = turned(p_k, p_cos, p_sin, i_z, i_k * D, i_d, b_k_in, half, DTYPE)
        b_seen = visible(p_keep, i_q[:, None], i_k[None, :], T, MASKED)
        b_s = product(b_q1, b_q2, b_k1, b_k2, BM, BN, PRECISION) * scale
        b_p = tl.exp(tl.where(b_seen, b_s, float("-inf")) - b_lse[:, None])
        b_v1, b_v2 = halves(p_v, i_z, i_d, b_k_in, half)
        b_dp = product(b_dy1, b_dy2, b_v1.to(DTYPE), b_v2.to(DTYPE), BM, BN, PRECISION)
        if i < blocks:
            b_along += tl.sum(b_p * b_dp, 1)
        else:
            b_ds = round_to(b_p * (b_dp - b_along[:, None]) * scale, DTYPE)
            b_dq1 = dot(b_ds, b_k1, b_dq1, PRECISION)
            b_dq2 = dot(b_ds, b_k2, b_dq2, PRECISION)
    tl.store(p_along + i_lse, b_along, mask=i_q < T)
    store_turned_back(p_dq, p_cos, p_sin, i_x, i_q * D, i_d, b_in, half, b_dq1, b_dq2)


@triton.jit
def keys_kernel(
    p_dy, p_q, p_k, p_v, p_cos, p_sin, p_keep, p_lse, p_along, p_dk, p_dv, T, H, G, D, angles, masks, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of a head: sums over its group's heads and queries, in one order."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    half = D // 2
    i_group = tl.program_id(1) % G
    i_batch = (tl.program_id(1) // G).to(tl.int64)
    # offsets within a row of the batch are 32 bits wide: wider ones take the registers of the tiles
    queries, keys = i_batch * T * H * D, i_batch * T * G * D
    p_q, p_k, p_v, p_keep = p_q + queries, p_k + keys, p_v + keys, p_keep + i_batch * masks
    p_cos, p_sin, p_lse = p_cos + i_batch * angles, p_sin + i_batch * angles, p_lse + i_batch * H * T
    p_dy, p_along, p_dk, p_dv = p_dy + queries, p_along + i_batch * H * T, p_dk + keys, p_dv + keys
    i_k = tl.program_id(0) * BN + tl.arange(0, BN)
    i_d = tl.arange(0, BD)
    b_in = (i_k < T)[:, None] & (i_d < half)[None, :]
    i_z = (i_k * G + i_group) * D
    b_k1, b_k2 = turned(p_k, p_cos, p_sin, i_z, i_k * D, i_d, b_in, half, DTYPE)
    b_v1, b_v2 = halves(p_v, i_z, i_d, b_in, half)
    b_v1, b_v2 = b_v1.to(DTYPE), b_v2.to(DTYPE)
    b_dk1 = tl.zeros((BN, BD), tl.float32)
    b_dk2 = tl.zeros((BN, BD), tl.float32)
    b_dv1 = tl.zeros((BN, BD), tl.float32)
    b_dv2 = tl.zeros((BN, BD), tl.float32)
    first = 0
    if not MASKED:
        first = tl.program_id(0) * BN // BM  # earlier queries do not see these keys
    blocks = tl.cdiv(T, BM) - first
    share = H // G
    for i in tl.range(0, share * blocks, num_stages=1):
        i_head = i_group * share + i // blocks
        i_q = (first + i % blocks) * BM + tl.arange(0, BM)
        b_q_in = (i_q < T)[:, None] & (i_d < half)[None, :]
        i_x = (i_q * H + i_head) * D
        b_q1, b_q2 = turned(p_q, p_cos, p_sin, i_x, i_q * D, i_d, b_q_in, half, DTYPE)
        b_dy1, b_dy2 = halves(p_dy, i_x, i_d, b_q_in, half)
        b_dy1, b_dy2 = b_dy1.to(DTYPE), b_dy2.to(DTYPE)
        i_lse = i_head * T + i_q
        b_lse = tl.load(p_lse + i_lse, mask=i_q < T, other=float("inf"))
        b_along = tl.load(p_along + i_lse, mask=i_q < T, other=0.0)
        b_seen = visible(p_keep, i_q[None, :], i_k[:, None], T, MASKED)
        # [keys, queries], so that they are the left factors of the gradients as they are
        b_s = product(b_k1, b_k2, b_q1, b_q2, BN, BM, PRECISION) * scale
        b_p = tl.exp(tl.where(b_seen, b_s, float("-inf")) - b_lse[None, :])
        b_dp = product(b_v1, b_v2, b_dy1, b_dy2, BN, BM, PRECISION)
        b_ds = round_to(b_p * (b_dp - b_along[None, :]) * scale, DTYPE)
        b_p = round_to(b_p, DTYPE)
        b_dv1 = dot(b_p, b_dy1, b_dv1, PRECISION)
        b_dv2 = dot(b_p, b_dy2, b_dv2, PRECISION)
        b_dk1 = dot(b_ds, b_q1, b_dk1, PRECISION)
        b_dk2 = dot(b_ds, b_q2, b_dk2, PRECISION)
    store_turned_back(p_dk, p_cos, p_sin, i_z, i_k * D, i_d, b_in, half, b_dk1, b_dk2)
    p_first = p_dv + i_z[:, None] + i_d[None, :]
    tl.store(p_first, round_to(b_dv1, DTYPE), mask=b_in)
    tl.store(p_first + half, round_to(b_dv2, DTYPE), mask=b_in)
