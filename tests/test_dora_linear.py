"""dora_linear: native at every level and the reference against float64; PEFT's formula; gradients; dispatch."""

from __future__ import annotations

from collections.abc import Iterator

import dora_tools
import pytest
import torch
from lora_tools import BF16, F32, LEVELS, at_level, make
from torch import Tensor

from peft_kernels import dora_linear, dora_norm, lora_linear, philox, use_backend
from peft_kernels.ops import dora_linear as op
from peft_kernels.testing import assert_no_worse


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


def parts(m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W, a, b, magnitude and bias that want gradients."""
    shapes = ((m, k), (n, k), (r, k), (n, r), (n,), (n,))
    return [(torch.randn(s, dtype=torch.float64) * 0.5).to(dtype).requires_grad_() for s in shapes]


# ---- the reference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_formula_of_peft(p: float) -> None:
    """y = W x + b + (g - 1) W d + g s B A d, with g = m / |W + sBA| (PEFT's result, then the base layer's added)."""
    x, w, a, b, m, bias = parts(5, 4, 6, 2)
    seed, s = torch.tensor([77]), 0.7
    norm = (w + s * b @ a).norm(dim=1)
    g, d = m / norm, x if not p else philox.dropout(x, p, seed)
    want = x @ w.t() + bias + (g - 1) * (d @ w.t()) + g * s * (d @ a.t() @ b.t())
    got = dora_linear(x, w, a, b, m, dora_norm(w, a, b, s), s, bias, p, seed if p else None)
    magnitude = x.abs() @ w.abs().t() * (2 + g.abs()) / (1 - p) + g.abs() * s * (d.abs() @ a.abs().t() @ b.abs().t())
    assert_no_worse(got, want, want, magnitude + bias.abs())


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_the_reference(p: float) -> None:
    """Of everything, also through the norm (the full gradient) and where it is a constant."""
    inputs, seed = parts(3, 4, 5, 2), torch.tensor([5]) if p else None

    def full(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        return dora_linear(x, w, a, b, m, dora_norm(w, a, b, 0.7), 0.7, bias, p, seed)

    norm = dora_norm(*(t.detach() for t in inputs[1:4]), 0.7)

    def constant(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        return dora_linear(x, w, a, b, m, norm, 0.7, bias, p, seed)

    assert torch.autograd.gradcheck(full, inputs)
    assert torch.autograd.gradcheck(constant, inputs)


def test_no_gain_is_lora() -> None:
    """A magnitude of |W + sBA| leaves LoRA; zero B and the base's norms leave the base."""
    x, w, a, b, _, bias = (t.detach() for t in parts(6, 5, 7, 3))
    norm = dora_norm(w, a, b, 1.5)
    size = x.abs() @ (w.abs() + 1.5 * b.abs() @ a.abs()).t() + bias.abs()
    want = lora_linear(x, w, a, b, 1.5, bias)
    assert_no_worse(dora_linear(x, w, a, b, norm, norm, 1.5, bias), want, want, size)
    zero, plain = torch.zeros_like(b), torch.nn.functional.linear(x, w, bias)
    assert_no_worse(dora_linear(x, w, a, zero, w.norm(dim=1), dora_norm(w, a, zero), 1.0, bias), plain, plain, size)


def test_opcheck() -> None:
    for quant, p in (("dense", 0.0), ("nf4", 0.3)):
        c = make(3, 8, 64, quant=quant, r=2, p=p, bias=True)
        gain = dora_tools.make_gain(8)
        with use_backend("reference"):
            calls: list[tuple[object, ...]] = []
            for fn in (op.forward_op, op.backward_op):
                record = lambda *args: calls.append(args) or fn.reference(*args)  # noqa: B023, E731
                if fn is op.forward_op:
                    _, h, s = dora_tools.forward(c, gain, record)
                else:
                    dora_tools.backward(c, gain, h, s, record)
                torch.library.opcheck(fn.op, calls[-1])


def test_bad_input() -> None:
    x, w, a, b, m, _ = (t.detach() for t in parts(3, 4, 5, 2))
    norm = dora_norm(w, a, b)
    with pytest.raises(ValueError, match=r"dora_linear: x must be \[\.\.\., 5\] to fit the weight \[4, 5\]"):
        dora_linear(x[:, :4], w, a, b, m, norm)
    with pytest.raises(ValueError, match=r"dora_linear: magnitude and norm must be of 4 elements and \[4\]"):
        dora_linear(x, w, a, b, m[:3], norm)
    with pytest.raises(ValueError, match=r"dora_linear: b must be \[4, 2\]"):
        dora_linear(x, w, a, b[:3], m, norm)
    with pytest.raises(ValueError, match="dora_linear: dropout_p must be in"):
        dora_linear(x, w, a, b, m, norm, dropout_p=1.0)
    with pytest.raises(TypeError, match=r"dora_linear: gain must be torch\.float32 for x in torch\.bfloat16"):
        op.forward_op.op(x.bfloat16(), w, *[None] * 4, 0, 64, 256, 4, a, b, m, 1.0, None, 0.0, None, False)


def test_dense_weights_and_magnitudes_train_under_autocast() -> None:
    x, w, a, b, m, bias = parts(6, 5, 8, 2, F32)
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(x, w, a, b, m, dora_norm(w, a, b), 1.0, bias, 0.1)
    assert y.dtype is BF16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype is F32 and t.grad.abs().sum() > 0 for t in (x, w, a, b, m, bias))
