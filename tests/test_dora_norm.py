"""dora_norm and squared_row_norms: native at every level and the reference against float64, where terms cancel too."""

from __future__ import annotations

from collections.abc import Iterator

import dora_tools
import pytest
import torch
from lora_tools import F32, LEVELS, at_level, make
from torch import Tensor

from peft_kernels import dora_norm, squared_row_norms, use_backend
from peft_kernels.ops import dora_norm as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


def dense(n: int, k: int, r: int) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((n, k), (r, k), (n, r))]


# ---- the reference --------------------------------------------------------------------------------------------------
def test_definition() -> None:
    w, a, b = (t.detach() for t in dense(7, 9, 3))
    want = (w + 0.7 * b @ a).norm(dim=1)
    assert_no_worse(dora_norm(w, a, b, 0.7), want, want)
    assert_no_worse(dora_norm(w, a, b, 0.7, squared_row_norms(w)), want, want)
    squares = w.square().sum(1)
    assert_no_worse(squared_row_norms(w), squares, squares)
    assert squared_row_norms(w.bfloat16()).dtype is torch.float64
    assert dora_norm(w.bfloat16(), a.float(), b.float()).dtype is F32


def test_full_gradient_of_the_reference() -> None:
    w, a, b = dense(4, 5, 2)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: dora_norm(*t, 0.7), (w, a, b))
        packed = random_quant_weight(4, 64)
        wide = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 64), (4, 3))]
        assert torch.autograd.gradcheck(lambda *t: dora_norm(packed, *t, 0.7), wide)


def test_rows_of_zeros_have_no_gradient() -> None:
    w, a, b = torch.zeros(3, 4), torch.randn(2, 4, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    norm = dora_norm(w, a, b)
    assert_same_bits(norm.detach(), torch.zeros(3))
    norm.sum().backward()
    assert_same_bits(a.grad, torch.zeros(2, 4))
    assert_same_bits(b.grad, torch.zeros(3, 2))


def test_opcheck() -> None:
    for quant in ("dense", "nf4"):
        c = make(1, 8, 64, quant=quant, r=2)
        with use_backend("reference"):
            torch.library.opcheck(op.norm_op.op, dora_tools.norm_args(c))
            torch.library.opcheck(op.squares_op.op, (*c.weight, 8, 64))


def test_bad_input() -> None:
    w, a, b = (t.detach() for t in dense(4, 5, 2))
    with pytest.raises(ValueError, match=r"dora_norm: a must be \[r, 5\] to fit the weight \[4, 5\], got \(2, 4\)"):
        dora_norm(w, a[:, :4], b)
    with pytest.raises(ValueError, match=r"dora_norm: b must be \[4, 2\], got \(4, 1\)"):
        dora_norm(w, a, b[:, :1])
    with pytest.raises(ValueError, match=r"dora_norm: base_sq must be floating-point \[4\]"):
        dora_norm(w, a, b, 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match=r"squared_row_norms: weight must be \[N, K\]"):
        squared_row_norms(w[0])
    with pytest.raises(TypeError, match="squared_row_norms: weight must be a floating-point tensor"):
        squared_row_norms(w.long())
