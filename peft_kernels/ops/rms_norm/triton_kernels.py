"""Triton kernels of rms_norm. Imported only when one is launched."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import round_to


@triton.jit
def rms_norm_kernel(p_x, p_weight, p_y, N, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    i_row = tl.program_id(0).to(tl.int64) * N
    b_x = tl.load(p_x + i_row + i, mask=i < N, other=0.0).to(tl.float32)
    b_w = tl.load(p_weight + i, mask=i < N, other=0.0).to(tl.float32)
    b_inverse = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x) / N + eps)
    tl.store(p_y + i_row + i, round_to(b_x * b_inverse * b_w, p_y.dtype.element_ty), mask=i < N)


@triton.jit
def rms_norm_backward_kernel(p_dy, p_x, p_weight, p_dx, N, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    i_row = tl.program_id(0).to(tl.int64) * N
    b_x = tl.load(p_x + i_row + i, mask=i < N, other=0.0).to(tl.float32)
    b_w = tl.load(p_weight + i, mask=i < N, other=0.0).to(tl.float32)
    b_g = tl.load(p_dy + i_row + i, mask=i < N, other=0.0).to(tl.float32) * b_w
    b_inverse = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x) / N + eps)
    b_along = tl.sum(b_g * b_x) / N * b_inverse * b_inverse
    tl.store(p_dx + i_row + i, round_to((b_g - b_x * b_along) * b_inverse, p_dx.dtype.element_ty), mask=i < N)
