"""Triton kernels of dora_linear beside lora_linear's: what DoRA adds is elementwise. Imported when one is launched.

The forward is lora_linear's `forward_kernel` with GAIN. In the backward, one pass over dy makes dh = gain * dy, which
the product with W reads as it is, and the column sums of dy * h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import keep_mask, round_to


@triton.jit(do_not_specialize=["M", "threshold", "keep_scale"])
def drop_kernel(
    p_x, p_rest, p_d, p_seed, M, K, threshold, keep_scale,
    MIX: tl.constexpr, BY_FOUR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """d = drop(x) and rest = x - d, [M, K]; with MIX d = drop(x - rest) + rest, which is the transpose of that."""
    i_m0, i_k0 = tl.program_id(0) * BM, tl.program_id(1) * BK
    i_m = i_m0 + tl.arange(0, BM)
    i_k = i_k0 + tl.arange(0, BK)
    b_in = (i_m < M)[:, None] & (i_k < K)[None, :]
    i = i_m.to(tl.int64)[:, None] * K + i_k[None, :]
    b_keep = keep_mask(p_seed, i_m, i_k0, K, threshold, BM, BK, BY_FOUR)
    b_x = tl.load(p_x + i, mask=b_in, other=0.0).to(tl.float32)
    if MIX:
        b_rest = tl.load(p_rest + i, mask=b_in, other=0.0).to(tl.float32)
        b_d = tl.where(b_keep, (b_x - b_rest) * keep_scale, 0.0) + b_rest
    else:
        b_d = tl.where(b_keep, b_x * keep_scale, 0.0)
        tl.store(p_rest + i, round_to(b_x - b_d, p_rest.dtype.element_ty), mask=b_in)
    tl.store(p_d + i, round_to(b_d, p_d.dtype.element_ty), mask=b_in)


@triton.jit(do_not_specialize=["M", "steps"])
def scale_kernel(
    p_dy, p_gain, p_h, p_dh, p_dgain, M, N, steps,
    WITH_DH: tl.constexpr, WITH_DGAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`steps` tiles of BM rows: dh = gain * dy [M, N] and part i_part of dgain = colsum(dy * h), float32 [parts, N]."""
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    i_part = tl.program_id(1)
    b_cols = i_n < N
    b_gain = tl.load(p_gain + i_n, mask=b_cols, other=0.0)
    b_sum = tl.zeros((BM, BN), tl.float32)
    for i_step in range(i_part * steps, tl.minimum(tl.cdiv(M, BM), (i_part + 1) * steps)):
        i_m = i_step * BM + tl.arange(0, BM)
        b_in = (i_m < M)[:, None] & b_cols[None, :]
        i = i_m.to(tl.int64)[:, None] * N + i_n[None, :]
        b_dy = tl.load(p_dy + i, mask=b_in, other=0.0).to(tl.float32)
        if WITH_DH:
            tl.store(p_dh + i, round_to(b_dy * b_gain[None, :], p_dh.dtype.element_ty), mask=b_in)
        if WITH_DGAIN:
            b_sum += b_dy * tl.load(p_h + i, mask=b_in, other=0.0).to(tl.float32)
    if WITH_DGAIN:
        tl.store(p_dgain + i_part.to(tl.int64) * N + i_n, tl.sum(b_sum, axis=0), mask=b_cols)
