"""Triton kernels of cayley. Imported only when one is launched. Blocks are padded with zeros to B x B."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(SIZE: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    i_at = tl.program_id(0).to(tl.int64) * (SIZE * SIZE) + i[:, None] * SIZE + i[None, :]
    b_in = (i < SIZE)[:, None] & (i < SIZE)[None, :]
    b_eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    return i_at, b_in, b_eye


@triton.jit
def _power(b_q, b_eye, K: tl.constexpr, N: tl.constexpr, middle, last):
    """P_K = w_K I + Q P_{K + 1} of a series of N terms: by Horner from the last."""
    b_p = last * b_eye
    for k in tl.static_range(K, N - 1):
        b_p = tl.dot(b_q, b_p, (1.0 if N - 2 - k + K == 0 else middle) * b_eye, input_precision="ieee")
    return b_p


@triton.jit
def cayley_kernel(p_q, p_r, middle, last, SIZE: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    i_at, b_in, b_eye = _places(SIZE, B)
    b_q = tl.load(p_q + i_at, mask=b_in, other=0.0)
    if N > 2:
        b_r = _power(b_q, b_eye, 0, N, middle, last)
    elif N == 2:
        b_r = b_eye + last * b_q
    elif N == 1:
        b_r = b_eye
    else:
        # (I - Q)^T R^T = (I + Q)^T by Gauss and Jordan. I - Q has a positive symmetric part: no pivots are needed.
        i = tl.arange(0, B)
        b_left = b_eye - tl.trans(b_q)
        b_right = b_eye + tl.trans(b_q)
        for p in range(SIZE):
            b_row = (i == p)[:, None]
            b_column = tl.sum(tl.where((i == p)[None, :], b_left, 0.0), 1)
            inverse = 1.0 / tl.sum(tl.where(i == p, b_column, 0.0))
            b_l = tl.sum(tl.where(b_row, b_left, 0.0), 0) * inverse
            b_r0 = tl.sum(tl.where(b_row, b_right, 0.0), 0) * inverse
            b_factor = tl.where(i == p, 0.0, b_column)[:, None]
            b_left = tl.where(b_row, b_l[None, :], b_left - b_factor * b_l[None, :])
            b_right = tl.where(b_row, b_r0[None, :], b_right - b_factor * b_r0[None, :])
        b_r = tl.trans(b_right)
    tl.store(p_r + i_at, b_r, mask=b_in)


@triton.jit
def cayley_backward_kernel(p_dr, p_q, p_r, p_dq, middle, last, SIZE: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    i_at, b_in, b_eye = _places(SIZE, B)
    b_g = tl.load(p_dr + i_at, mask=b_in, other=0.0)
    if N == 0:  # dQ = S^T dR S^T / 2 with S = R + I
        b_s = tl.trans(tl.load(p_r + i_at, mask=b_in, other=0.0) + b_eye)
        b_dq = 0.5 * tl.dot(tl.dot(b_s, b_g, input_precision="ieee"), b_s, input_precision="ieee")
    else:  # dQ += G P_{k + 1}^T, then G becomes Q^T G; the powers are computed again rather than kept
        b_q = tl.load(p_q + i_at, mask=b_in, other=0.0)
        b_dq = tl.zeros((B, B), tl.float32)
        for k in tl.static_range(0, N - 1):
            b_p = _power(b_q, b_eye, k + 1, N, middle, last)
            b_dq = tl.dot(b_g, tl.trans(b_p), b_dq, input_precision="ieee")
            b_g = tl.dot(tl.trans(b_q), b_g, input_precision="ieee")
    tl.store(p_dq + i_at, b_dq, mask=b_in)
