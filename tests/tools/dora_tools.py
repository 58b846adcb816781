"""Calls of dora_linear and dora_norm for the tests of every backend: cases of lora_tools with a gain, and the laws."""

from __future__ import annotations

from typing import Any

import torch
from lora_tools import Case, make, on_tensor_cores
from torch import Tensor

from peft_kernels.ops import dora_linear as op
from peft_kernels.ops import dora_norm as norm_op
from peft_kernels.ops.lora_linear import dense_weight
from peft_kernels.testing import assert_no_worse


def make_gain(n: int, seed: int = 0) -> Tensor:
    """Gains around 1, one of them 0 and one negative (magnitudes are free parameters)."""
    gain = 1 + 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    gain[n // 2] = 0.0
    gain[-1] *= -1
    return gain


def forward(c: Case, gain: Tensor, fn: Any, need_h: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return fn(c.x, *c.weight, c.n, c.a, c.b, gain, c.scaling, c.bias, c.p, c.seed, need_h)  # type: ignore[no-any-return]


def backward(c: Case, gain: Tensor, h: Tensor, s: Tensor, fn: Any) -> tuple[Tensor, ...]:
    return fn(c.dy, c.x, *c.weight, c.a, c.b, gain, h, s, c.scaling, c.p, c.seed, True, True, True)  # type: ignore[no-any-return]


def check(c: Case, gain: Tensor) -> None:
    """Forward and backward of the forced backend are no worse than eager code in the same dtype."""
    exact, wide = c.double(), gain.double()
    assert exact.a is not None
    assert exact.b is not None
    w = dense_weight(*exact.weight, c.n, c.x.shape[1], torch.float64).abs()
    keep = 1 - c.p
    y, h, s = forward(c, gain, op.forward_op.op)
    eager = forward(c, gain, op.forward_op.reference)
    want = forward(exact, wide, op.forward_op.reference)
    s_size = exact.x.abs() @ exact.a.abs().t() / keep
    base = exact.x.abs() @ w.t() / keep
    h_size = base + c.scaling * (s_size @ exact.b.abs().t())
    y_size = wide.abs() * h_size + (base if c.p else 0)
    if exact.bias is not None:
        y_size = y_size + exact.bias.abs()
    for part in zip((y, h, s), eager, want, (y_size, h_size, s_size), (0, 0, on_tensor_cores(c.x, w.shape[1])),
                    strict=True):  # fmt: skip
        assert_no_worse(*part)
    # both from one h and s, whose rounding would decide dgain
    got_grads = backward(c, gain, eager[1], eager[2], op.backward_op.op)
    eager_grads = backward(c, gain, eager[1], eager[2], op.backward_op.reference)
    want_grads = backward(exact, wide, want[1], want[2], op.backward_op.reference)
    dh = wide.abs() * exact.dy.abs()
    ds = c.scaling * (dh @ exact.b.abs())
    sizes = ((dh @ w + (exact.dy.abs() @ w if c.p else 0) + ds @ exact.a.abs()) / keep, ds.t() @ exact.x.abs() / keep,
             c.scaling * (dh.t() @ s_size), (exact.dy.abs() * h_size).sum(0))  # fmt: skip
    terms = (0, on_tensor_cores(c.x, *c.dy.shape), on_tensor_cores(c.x, *c.x.shape), 0)
    for part in zip(got_grads, eager_grads, want_grads, sizes, terms, strict=True):
        assert_no_worse(*part)


def norm_args(c: Case, base_sq: Tensor | None = None) -> tuple[Any, ...]:
    return (*c.weight, c.a, c.b, c.scaling, base_sq)


def check_norm(c: Case, base_sq: bool = False) -> Tensor:
    """The norms of the forced backend are no worse than those of W + sBA in float32, given |W|^2 or not; and |W|^2."""
    exact, n, k = c.double(), c.n, c.x.shape[1]
    squares = norm_op.squares_op.op(*c.weight, n, k)
    want_squares = norm_op.squares_op.reference(*exact.weight, n, k)
    assert_no_worse(squares, norm_op.squares_op.reference(*c.weight, n, k).float().double(), want_squares)
    got = norm_op.norm_op.op(*norm_args(c, squares if base_sq else None))
    eager, want = norm_op.norm_op.reference(*norm_args(c)), norm_op.norm_op.reference(*norm_args(exact))
    # an element's rounding is one of its terms', which can be far larger than what is left of them
    w = dense_weight(*exact.weight, n, k, torch.float64).abs()
    assert exact.a is not None
    assert exact.b is not None
    terms = w + c.scaling * (exact.b.abs() @ exact.a.abs())
    assert_no_worse(got, eager, want, terms.norm(dim=1), exact.a.shape[0])
    return got


def cancelling(n: int, k: int, r: int, share: float, **kind: Any) -> Case:
    """sBA is -W up to `share` of it in some rows, and zero in others: W = s B A + noise, then B negated."""
    c = make(2, n, k, r=r, **kind)
    assert c.a is not None
    assert c.b is not None
    w = dense_weight(*c.double().weight, n, k, torch.float64)
    rows = torch.arange(n) % 3
    if c.weight[5] == 0:
        noise = torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        near = c.scaling * (c.b.double() @ c.a.double())
        near = near + share * noise * near.norm(dim=1, keepdim=True) / k**0.5
        w = torch.where(rows[:, None] == 0, near, w)
        c.weight = (w.to(c.weight[0].dtype), *c.weight[1:])
        sign = torch.where(rows == 0, -1.0, torch.where(rows == 1, 0.0, 1.0))
        c.b = (c.b * sign[:, None]).contiguous()
    else:  # a rank that spans the rows: B A = -W is solved for
        solved = torch.linalg.lstsq(c.a.double().t(), w.t()).solution.t() / -c.scaling
        keep = torch.where(rows == 0, 1 - share, torch.where(rows == 1, 0.0, 0.5))
        c.b = (solved * keep[:, None]).to(c.b.dtype)
    return c
