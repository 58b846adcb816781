"""Triton kernels of gated. Imported only when one is launched."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import round_to


@triton.jit
def sigmoid(b_z):
    """(1 / (1 + exp(-z)), one minus that), neither by a difference, nor by an exponential that overflows."""
    b_e = tl.exp(-tl.abs(b_z))
    b_large = 1.0 / (1.0 + b_e)
    b_small = b_e * b_large
    return tl.where(b_z < 0, b_small, b_large), tl.where(b_z < 0, b_large, b_small)


@triton.jit
def normal(b_g):
    """(Phi(g), exp(-g^2 / 2)): the polynomial of csrc/cpu/gated.inc, which loses nothing in the smaller tail."""
    b_a = tl.abs(b_g)
    b_e = tl.exp(-0.5 * b_a * b_a)
    b_t = 1.0 / (b_a + 3.0)
    b_w = (b_a - 3.0) * b_t
    b_q = b_w * -2.59309941e-4 - 8.92530688e-4
    b_q = b_w * b_q + 1.07323938e-3
    b_q = b_w * b_q + 6.9161693e-3
    b_q = b_w * b_q - 1.0480145e-2
    b_q = b_w * b_q - 4.7254464e-2
    b_q = b_w * b_q + 2.30019435e-1
    b_q = b_w * b_q - 5.09332373e-1
    b_q = b_w * b_q + 7.29083668e-1
    b_small = tl.where(b_a > 15.0, 0.0, b_e * (b_q * b_t))
    return tl.where(b_g < 0, b_small, 1.0 - b_small), b_e


@triton.jit
def activate(b_g, alpha, ACT: tl.constexpr):
    """(act(g), act'(g)); what is not used of them costs nothing. ACT: SILU to RELU2 of `gated`."""
    if ACT == 0:
        b_s, b_rest = sigmoid(b_g * alpha)
        b_f = b_g * b_s
        b_slope = b_s + b_f * (b_rest * alpha)
    elif ACT == 1:
        b_s, b_e = normal(b_g)
        b_f = b_g * b_s
        b_slope = b_s + b_g * b_e * 0.398942280  # 1 / sqrt(2 pi)
    elif ACT == 2:  # 0.5 (1 + tanh u) is the sigmoid of z = 2 u; its factors are 2 sqrt(2 / pi) and 0.044715 of it
        b_near = tl.where(tl.abs(b_g) > 30.0, tl.where(b_g < 0, -30.0, 30.0), b_g)  # beyond, squares may overflow
        b_square = b_near * b_near
        b_s, b_rest = sigmoid(b_near * (b_square * 0.0713548163 + 1.59576912))
        b_f = b_g * b_s
        b_slope = b_s + b_f * b_rest * (b_square * 0.214064449 + 1.59576912)
    else:
        b_f = tl.where(b_g <= 0, 0.0, b_g)
        b_slope = tl.where(b_f > 0, 1.0, b_f)
        if ACT == 4:
            b_slope = 2.0 * b_f
            b_f = b_f * b_f
    return b_f, b_slope


@triton.jit
def at_most(b_t, limit):
    return tl.where(b_t > limit, limit, b_t)  # a NaN stays


@triton.jit
def forward_kernel(
    p_gate, p_up, p_h, alpha, limit, shift, n, blocks, gate_row, gate_step, up_row, up_step,
    ACT: tl.constexpr, HAS_UP: tl.constexpr, HAS_LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_in = i < n
    b_g = tl.load(p_gate + i_row * gate_row + i * gate_step, mask=b_in, other=0.0).to(tl.float32)
    if HAS_LIMIT:
        b_g = at_most(b_g, limit)
    b_h, _ = activate(b_g, alpha, ACT)
    if HAS_UP:
        b_u = tl.load(p_up + i_row * up_row + i * up_step, mask=b_in, other=0.0).to(tl.float32)
        if HAS_LIMIT:
            b_u = -at_most(-at_most(b_u, limit), limit)
        b_h = b_h * (b_u + shift)
    tl.store(p_h + i_row * n + i, round_to(b_h, p_h.dtype.element_ty), mask=b_in)


@triton.jit
def backward_kernel(
    p_gate, p_up, p_dgate, p_dup, p_dh, alpha, limit, shift, n, blocks, gate_row, gate_step, up_row, up_step,
    dgate_row, dgate_step, dup_row, dup_step,
    ACT: tl.constexpr, HAS_UP: tl.constexpr, HAS_LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_in = i < n
    b_g = tl.load(p_gate + i_row * gate_row + i * gate_step, mask=b_in, other=0.0).to(tl.float32)
    b_along = tl.load(p_dh + i_row * n + i, mask=b_in, other=0.0).to(tl.float32)
    b_cut = b_g
    if HAS_LIMIT:
        b_cut = at_most(b_g, limit)
    b_f, b_slope = activate(b_cut, alpha, ACT)
    if HAS_UP:
        b_u = tl.load(p_up + i_row * up_row + i * up_step, mask=b_in, other=0.0).to(tl.float32)
        b_dup = b_along * b_f
        if HAS_LIMIT:  # nothing comes back from what was cut
            b_dup = tl.where(tl.abs(b_u) > limit, 0.0, b_dup)
            b_u = -at_most(-at_most(b_u, limit), limit)
        tl.store(p_dup + i_row * dup_row + i * dup_step, round_to(b_dup, p_dup.dtype.element_ty), mask=b_in)
        b_along = b_along * (b_u + shift)
    b_dgate = b_along * b_slope
    if HAS_LIMIT:
        b_dgate = tl.where(b_g > limit, 0.0, b_dgate)
    tl.store(p_dgate + i_row * dgate_row + i * dgate_step, round_to(b_dgate, p_dgate.dtype.element_ty), mask=b_in)
