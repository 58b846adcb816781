"""Triton kernels of swiglu. Imported only when one is launched."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import round_to


@triton.jit
def sigmoid(b_g):
    """(1 / (1 + exp(-g)), one minus that), neither by a difference, nor by an exponential that overflows."""
    b_e = tl.exp(-tl.abs(b_g))
    b_large = 1.0 / (1.0 + b_e)
    b_small = b_e * b_large
    return tl.where(b_g < 0, b_small, b_large), tl.where(b_g < 0, b_large, b_small)


@triton.jit
def forward_kernel(p_gate, p_up, p_h, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_g = tl.load(p_gate + i, mask=i < numel, other=0.0).to(tl.float32)
    b_u = tl.load(p_up + i, mask=i < numel, other=0.0).to(tl.float32)
    b_s, _ = sigmoid(b_g)
    tl.store(p_h + i, round_to(b_g * b_s * b_u, p_h.dtype.element_ty), mask=i < numel)


@triton.jit
def backward_kernel(p_gate, p_up, p_dh, p_dgate, p_dup, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_g = tl.load(p_gate + i, mask=i < numel, other=0.0).to(tl.float32)
    b_u = tl.load(p_up + i, mask=i < numel, other=0.0).to(tl.float32)
    b_d = tl.load(p_dh + i, mask=i < numel, other=0.0).to(tl.float32)
    b_s, b_rest = sigmoid(b_g)
    b_silu = b_g * b_s
    tl.store(p_dup + i, round_to(b_d * b_silu, p_dup.dtype.element_ty), mask=i < numel)
    b_dgate = b_d * b_u * (b_s + b_silu * b_rest)
    tl.store(p_dgate + i, round_to(b_dgate, p_dgate.dtype.element_ty), mask=i < numel)
