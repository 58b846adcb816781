"""dora_norm and squared_row_norms: native at every level and the reference against float64, where terms cancel too."""

from __future__ import annotations

import dora_tools
import pytest
import torch
from lora_tools import F32, FLOATS, level_fixture, make, needs_native, threads
from torch import Tensor

from peft_kernels import dora_norm, squared_row_norms, use_backend
from peft_kernels.ops import dora_norm as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

level = level_fixture()


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


# ---- native ---------------------------------------------------------------------------------------------------------
@needs_native
@pytest.mark.parametrize("quant", ["dense", "nf4", "fp4"])
def test_any_shape_rank_and_dtype(level: str, quant: str) -> None:
    shapes = ((1, 1, 1), (5, 15, 2), (50, 192, 16), (7, 1088, 3), (130, 96, 5), (25, 77, 40))
    for i, (n, k, r) in enumerate(shapes):
        for ab in FLOATS if i == 2 else (F32,):
            blocksize = (64, 32, 128)[i % 3]
            c = make(1, n, k, quant=quant, nested=i % 2 == 0, blocksize=blocksize, r=r, ab=ab, w_dtype=FLOATS[i % 3])
            dora_tools.check_norm(c)
            dora_tools.check_norm(c, base_sq=True)


@needs_native
@pytest.mark.parametrize("share", [0.1, 1e-3, 1e-6])
def test_where_the_terms_cancel(level: str, share: float) -> None:
    """sBA is -W up to a share of it: what is left is that share of |W|, and no digits of it are lost."""
    for quant, k, r in (("dense", 96, 4), ("nf4", 64, 64)):
        c = dora_tools.cancelling(24, k, r, share, quant=quant)
        norm, base = dora_tools.check_norm(c, base_sq=True), squared_row_norms_of(c).sqrt()
        assert (norm[::3] < 3 * share * base[::3] + 1e-5).all()
        assert_no_worse(norm[1::3], base[1::3].float(), base[1::3])  # B is zero in these


def squared_row_norms_of(c: dora_tools.Case) -> Tensor:
    return op.squares_op.reference(*c.double().weight, c.n, c.x.shape[1])


@needs_native
@pytest.mark.parametrize("quant", ["dense", "nf4"])
def test_same_bits_on_one_and_two_threads(level: str, quant: str) -> None:
    c = make(1, 200, 576, quant=quant, nested=True, r=16)
    runs = []
    for n in (1, 2, 2):
        with threads(n):
            runs.append((op.norm_op.op(*dora_tools.norm_args(c)), op.squares_op.op(*c.weight, 200, 576)))
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert_same_bits(got, want)


@needs_native
def test_full_gradient_natively() -> None:
    """From the 4-bit weight itself, against the reference in float64."""
    packed, w = random_quant_weight(20, 128), None
    a, b = (torch.randn(s, requires_grad=True) for s in ((4, 128), (20, 4)))
    with use_backend("native"):
        got = torch.autograd.grad(dora_norm(packed, a, b, 0.7), (a, b), torch.ones(20))
    from peft_kernels import dequantize_4bit

    w = dequantize_4bit(packed, dtype=F32)

    def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = [t.detach().to(dtype).requires_grad_() for t in (a, b)]
        return torch.autograd.grad((w.to(dtype) + 0.7 * wide[1] @ wide[0]).norm(dim=1), wide, torch.ones(20).to(dtype))

    v = w.double().abs() + 0.7 * b.detach().double().abs() @ a.detach().double().abs()
    c = 0.7 / (w + 0.7 * b @ a).detach().double().norm(dim=1, keepdim=True)
    sizes = ((c * b.detach().double().abs()).t() @ v, c * v @ a.detach().double().abs().t())
    for g, eager, exact, size in zip(got, dense(F32), dense(torch.float64), sizes, strict=True):
        assert_no_worse(g, eager, exact, size)


@needs_native
def test_empty_and_strided() -> None:
    assert dora_norm(torch.randn(0, 8), torch.randn(2, 8), torch.randn(0, 2)).shape == (0,)
    assert_same_bits(dora_norm(torch.randn(3, 0), torch.randn(2, 0), torch.randn(3, 2)), torch.zeros(3))
    w, a, b = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    plain = dora_norm(w, a, b)
    assert_same_bits(dora_norm(w, a.t().contiguous().t(), b.t().contiguous().t()), plain)
    turned = dora_norm(w.t().contiguous().t(), a, b)  # by the reference, tile by tile
    assert_no_worse(turned, plain, (w.double() + b.double() @ a.double()).norm(dim=1), w.norm(dim=1) + b.norm(dim=1))
