"""Triton kernels of attention. Imported only when one is launched.

q and k come turned; what is added up along the keys, `along` = sum of p dp, comes from y. A tile has a head's features
padded to a power of two. What a query sees is a range of keys, [low, high), less what `keep` takes out of it.
Offsets within a row of the batch are 32 bits wide: wider ones take the registers of the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import dot, keep_mask, round_to


@triton.jit
def ranges(
    p_spans, i_q, T, S, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """(low, high) of the shape of i_q: empty for queries beyond T."""
    b_at = i_q + (S - T)
    b_low = tl.zeros_like(i_q)
    b_high = tl.where(i_q < T, S, 0)
    if WINDOW:
        b_low = tl.maximum(b_low, b_at - window + 1)
        b_high = tl.minimum(b_high, b_at + window)
    if CAUSAL:
        b_high = tl.minimum(b_high, b_at + 1)
    if SPANS:
        b_low = tl.maximum(b_low, tl.load(p_spans + i_q * 2, mask=i_q < T, other=0))
        b_high = tl.minimum(b_high, tl.load(p_spans + i_q * 2 + 1, mask=i_q < T, other=0))
    return b_low, b_high


@triton.jit
def tanh(b_x):
    """By its series where a difference of exponentials would lose digits; within 4 eps."""
    b_2 = b_x * b_x
    b_near = (2.06390887954e-2 - 5.70498872745e-3 * b_2) * b_2 - 5.37397155531e-2
    b_near = ((b_near * b_2 + 1.33314422036e-1) * b_2 - 3.33332819422e-1) * b_2 * b_x + b_x
    b_size = tl.abs(b_x)
    b_far = 1.0 - 2.0 / (tl.exp(2.0 * b_size) + 1.0)
    return tl.where(b_size < 0.625, b_near, tl.where(b_x < 0.0, -b_far, b_far))


@triton.jit
def scores(
    b_product, p_keep, p_bias, i_q, i_k, b_low, b_high, slope, T, S, keep_t, bias_t, scale, softcap,
    KEEP: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(scores, -inf where unseen; their derivatives by the products). i_q, b_low, b_high and i_k: of shapes that go
    together to that of the products."""
    b_seen = (i_k >= b_low) & (i_k < b_high)
    b_s = b_product * scale
    b_by = scale
    if SOFTCAP:
        b_t = tanh(b_s / softcap)
        b_by = scale * (1.0 - b_t * b_t)
        b_s = b_t * softcap
    if BIAS:
        b_s += tl.load(p_bias + i_q.to(tl.int64) * bias_t + i_k, mask=b_seen, other=0.0).to(tl.float32)
    if SLOPES:
        b_s += slope * (i_k - i_q - (S - T)).to(tl.float32)
    if KEEP:
        b_seen = b_seen & (tl.load(p_keep + i_q.to(tl.int64) * keep_t + i_k, mask=b_seen, other=0) != 0)
    return tl.where(b_seen, b_s, float("-inf")), b_by


@triton.jit
def rows(p, i_t, i_d, N, D, stride):
    """Rows i_t, below N, of a head at p: zeros beyond."""
    return tl.load(p + i_t[:, None] * stride + i_d[None, :], mask=(i_t < N)[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def product(b_x, b_z, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """x z^T [M, N]."""
    return dot(b_x, tl.trans(b_z), tl.zeros((M, N), tl.float32), PRECISION)


@triton.jit(do_not_specialize=["threshold"])
def forward_kernel(
    p_q, p_k, p_v, p_spans, p_keep, p_bias, p_slopes, p_seed, p_sinks, p_y, p_lse, q_b, q_t, q_h,
    k_b, k_t, k_h, v_b, v_t, v_h, keep_b, keep_t, bias_b, bias_h, bias_t, T, S, H, G, D, DV, window,
    scale, softcap, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
    SLOPES: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr,
    BY_FOUR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y and lse of BM queries of a head. _b, _t, _h: elements from a row of the batch, a token, a head to the next."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_head = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group = i_head // (H // G)
    p_q += i_batch * q_b + i_head * q_h
    p_k += i_batch * k_b + i_group * k_h
    p_v += i_batch * v_b + i_group * v_h
    p_keep += i_batch * keep_b
    p_bias += i_batch * bias_b + i_head.to(tl.int64) * bias_h
    p_y += i_batch * T * H * DV + i_head * DV
    i_q = tl.program_id(0) * BM + tl.arange(0, BM)
    i_row = (i_batch * H + i_head) * T + i_q
    i_d, i_v = tl.arange(0, BD), tl.arange(0, BV)
    b_q = rows(p_q, i_q, i_d, T, D, q_t)
    b_low, b_high = ranges(p_spans + i_batch * T * 2, i_q, T, S, window, CAUSAL, WINDOW, SPANS)
    b_top = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    if SINKS:
        sink = tl.load(p_sinks + i_head)
        b_top = tl.zeros((BM,), tl.float32) + sink
        b_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
    b_y = tl.zeros((BM, BV), tl.float32)
    slope = 0.0
    if SLOPES:
        slope = tl.load(p_slopes + i_head)
    first = tl.min(tl.where(b_low < b_high, b_low, S), 0) // BN * BN
    for i_k0 in tl.range(first, tl.max(b_high, 0), BN, num_stages=1):
        i_k = i_k0 + tl.arange(0, BN)
        b_k = rows(p_k, i_k, i_d, S, D, k_t)
        b_s, _ = scores(product(b_q, b_k, BM, BN, PRECISION), p_keep, p_bias, i_q[:, None], i_k[None, :],
                        b_low[:, None], b_high[:, None], slope, T, S, keep_t, bias_t, scale, softcap, KEEP, BIAS,
                        SLOPES, SOFTCAP)  # fmt: skip
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp(b_s - b_base[:, None])
        b_shrink = tl.exp(b_top - b_base)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        if DROPOUT:
            b_p = tl.where(keep_mask(p_seed, i_row, i_k0, S, threshold, BM, BN, BY_FOUR), b_p, 0.0)
        b_v = rows(p_v, i_k, i_v, S, DV, v_t)
        b_y = dot(round_to(b_p, DTYPE), b_v, b_y * b_shrink[:, None], PRECISION)
        b_top = b_new
    b_none = b_sum == 0.0  # sees nothing
    b_inverse = tl.where(b_none, 0.0, 1.0 / tl.where(b_none, 1.0, b_sum))[:, None]
    b_lse = tl.where(b_none, float("inf"), b_top + tl.log(tl.where(b_none, 1.0, b_sum)))
    tl.store(p_lse + i_row, b_lse, mask=i_q < T)
    if DROPOUT:
        b_inverse *= keep_scale
    p_out = p_y + i_q[:, None] * (H * DV) + i_v[None, :]
    tl.store(p_out, round_to(b_y * b_inverse, DTYPE), mask=(i_q < T)[:, None] & (i_v < DV)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def queries_kernel(
    p_dy, p_q, p_k, p_v, p_spans, p_keep, p_bias, p_slopes, p_seed, p_lse, p_along, p_dq, dy_b, dy_t, dy_h,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, keep_b, keep_t, bias_b, bias_h, bias_t, T, S, H, G, D, DV, window,
    scale, softcap, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
    SLOPES: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of a head, not turned back."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_head = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group = i_head // (H // G)
    p_dy += i_batch * dy_b + i_head * dy_h
    p_q += i_batch * q_b + i_head * q_h
    p_k += i_batch * k_b + i_group * k_h
    p_v += i_batch * v_b + i_group * v_h
    p_keep += i_batch * keep_b
    p_bias += i_batch * bias_b + i_head.to(tl.int64) * bias_h
    p_dq += i_batch * T * H * D + i_head * D
    i_q = tl.program_id(0) * BM + tl.arange(0, BM)
    i_d, i_v = tl.arange(0, BD), tl.arange(0, BV)
    b_q = rows(p_q, i_q, i_d, T, D, q_t)
    b_dy = rows(p_dy, i_q, i_v, T, DV, dy_t)
    i_row = (i_batch * H + i_head) * T + i_q
    b_lse = tl.load(p_lse + i_row, mask=i_q < T, other=float("inf"))
    b_along = tl.load(p_along + i_row, mask=i_q < T, other=0.0)
    b_low, b_high = ranges(p_spans + i_batch * T * 2, i_q, T, S, window, CAUSAL, WINDOW, SPANS)
    b_dq = tl.zeros((BM, BD), tl.float32)
    slope = 0.0
    if SLOPES:
        slope = tl.load(p_slopes + i_head)
    first = tl.min(tl.where(b_low < b_high, b_low, S), 0) // BN * BN
    for i_k0 in tl.range(first, tl.max(b_high, 0), BN, num_stages=1):
        i_k = i_k0 + tl.arange(0, BN)
        # both before the products: with a load between them float32 heads of 128 would spill
        b_k, b_v = rows(p_k, i_k, i_d, S, D, k_t), rows(p_v, i_k, i_v, S, DV, v_t)
        b_s, b_by = scores(product(b_q, b_k, BM, BN, PRECISION), p_keep, p_bias, i_q[:, None], i_k[None, :],
                           b_low[:, None], b_high[:, None], slope, T, S, keep_t, bias_t, scale, softcap, KEEP, BIAS,
                           SLOPES, SOFTCAP)  # fmt: skip
        b_p = tl.exp(b_s - b_lse[:, None])
        b_dp = product(b_dy, b_v, BM, BN, PRECISION)
        if DROPOUT:
            b_dp = tl.where(keep_mask(p_seed, i_row, i_k0, S, threshold, BM, BN, BY_FOUR), b_dp * keep_scale, 0.0)
        b_ds = round_to(b_p * (b_dp - b_along[:, None]) * b_by, DTYPE)
        b_dq = dot(b_ds, b_k, b_dq, PRECISION)
    p_out = p_dq + i_q[:, None] * (H * D) + i_d[None, :]
    tl.store(p_out, round_to(b_dq, DTYPE), mask=(i_q < T)[:, None] & (i_d < D)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def keys_kernel(
    p_dy, p_q, p_k, p_v, p_spans, p_keep, p_bias, p_slopes, p_seed, p_lse, p_along, p_dk, p_dv, dy_b, dy_t, dy_h,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, keep_b, keep_t, bias_b, bias_h, bias_t, T, S, H, G, D, DV, window,
    scale, softcap, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
    SLOPES: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk, not turned back, and dv of BN keys of a head: sums over its group's heads and queries, in one order."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_group = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    p_dy += i_batch * dy_b
    p_q += i_batch * q_b
    p_k += i_batch * k_b + i_group * k_h
    p_v += i_batch * v_b + i_group * v_h
    p_keep += i_batch * keep_b
    p_bias += i_batch * bias_b
    p_spans += i_batch * T * 2
    p_lse += i_batch * H * T
    p_along += i_batch * H * T
    p_dk += i_batch * S * G * D + i_group * D
    p_dv += i_batch * S * G * DV + i_group * DV
    i_k0 = tl.program_id(0) * BN
    i_k = i_k0 + tl.arange(0, BN)
    i_d, i_v = tl.arange(0, BD), tl.arange(0, BV)
    b_k = rows(p_k, i_k, i_d, S, D, k_t)
    b_v = rows(p_v, i_k, i_v, S, DV, v_t)
    b_dk = tl.zeros((BN, BD), tl.float32)
    b_dv = tl.zeros((BN, BV), tl.float32)
    first, end = 0, T
    if CAUSAL:
        first = tl.minimum(tl.maximum(i_k0 - (S - T), 0), T) // BM * BM  # earlier queries do not see these keys
    if WINDOW:
        end = tl.minimum(T, tl.maximum(i_k0 + BN - 1 + window - (S - T), first))
        if not CAUSAL:
            first = tl.minimum(tl.maximum(i_k0 - window + 1 - (S - T), 0), T) // BM * BM
    blocks = tl.cdiv(end - first, BM)
    share = H // G
    for i in tl.range(0, share * blocks, num_stages=1):
        i_head = i_group * share + i // blocks
        i_q = first + i % blocks * BM + tl.arange(0, BM)
        b_low, b_high = ranges(p_spans, i_q, T, S, window, CAUSAL, WINDOW, SPANS)
        low = tl.min(tl.where(b_low < b_high, b_low, S), 0)
        if (low < i_k0 + BN) & (tl.max(b_high, 0) > i_k0):
            b_q = rows(p_q + i_head * q_h, i_q, i_d, T, D, q_t)
            b_dy = rows(p_dy + i_head * dy_h, i_q, i_v, T, DV, dy_t)
            i_lse = i_head * T + i_q
            b_lse = tl.load(p_lse + i_lse, mask=i_q < T, other=float("inf"))
            b_along = tl.load(p_along + i_lse, mask=i_q < T, other=0.0)
            slope = 0.0
            if SLOPES:
                slope = tl.load(p_slopes + i_head)
            # [keys, queries], so that they are the left factors of the gradients as they are
            b_s, b_by = scores(product(b_k, b_q, BN, BM, PRECISION), p_keep, p_bias + i_head.to(tl.int64) * bias_h,
                               i_q[None, :], i_k[:, None], b_low[None, :], b_high[None, :], slope, T, S, keep_t, bias_t,
                               scale, softcap, KEEP, BIAS, SLOPES, SOFTCAP)  # fmt: skip
            b_p = tl.exp(b_s - b_lse[None, :])
            b_kept = b_p
            if DROPOUT:
                i_row = i_batch * H * T + i_lse
                b_keep = tl.trans(keep_mask(p_seed, i_row, i_k0, S, threshold, BM, BN, BY_FOUR))
                b_kept = tl.where(b_keep, b_p * keep_scale, 0.0)
            b_dp = product(b_v, b_dy, BN, BM, PRECISION)
            if DROPOUT:
                b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
            b_ds = round_to(b_p * (b_dp - b_along[None, :]) * b_by, DTYPE)
            b_dv = dot(round_to(b_kept, DTYPE), b_dy, b_dv, PRECISION)
            b_dk = dot(b_ds, b_q, b_dk, PRECISION)
    b_in = (i_k < S)[:, None]
    tl.store(p_dk + i_k[:, None] * (G * D) + i_d[None, :], round_to(b_dk, DTYPE), mask=b_in & (i_d < D)[None, :])
    tl.store(p_dv + i_k[:, None] * (G * DV) + i_v[None, :], round_to(b_dv, DTYPE), mask=b_in & (i_v < DV)[None, :])
