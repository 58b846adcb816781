"""lora_mixture: the reference against the sum that it stands for, and its gradients; the public function; bad input."""

from __future__ import annotations

import pytest
import torch
from forms import matrix
from mixture_tools import assert_same_sums
from torch import Tensor

from peft_kernels import dispatch, lora_linear, lora_mixture, use_backend
from peft_kernels.ops import lora_mixture as op
from peft_kernels.testing import assert_same_bits, random_quant_weight

F64 = torch.float64


def adapters(n: int, k: int, ranks: list[int], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(n + k + sum(ranks))
    return ([torch.randn(r, k, generator=g).to(dtype) for r in ranks],
            [(torch.randn(n, r, generator=g) * 0.1).to(dtype) for r in ranks])  # fmt: skip


def leaf(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=F64).requires_grad_()


def summed(x: Tensor, w: Tensor, a: list[Tensor], b: list[Tensor], mix: Tensor, scaling: list[float]) -> Tensor:
    """The definition, adapter by adapter."""
    y = x @ w.t()
    for i in range(len(a)):
        y = y + mix[..., i : i + 1] * scaling[i] * ((x @ a[i].t()) @ b[i].t())
    return y


# ---- the reference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [[3, 3], [4, 2, 6], [1, 0, 5]], ids=str)
def test_the_sum_that_it_stands_for(ranks: list[int]) -> None:
    """Outputs and every gradient in float64, adapters of different ranks, a weight per token."""
    n, scaling = len(ranks), [0.5, 2.0, 1.5][: len(ranks)]
    x, w, mix = leaf(2, 5, 12), leaf(7, 12), leaf(2, 5, n)
    a, b = ([leaf(r, 12, seed=i) for i, r in enumerate(ranks)], [leaf(7, r, seed=9 + i) for i, r in enumerate(ranks)])
    every = (x, w, mix, *a, *b)
    got, want = lora_mixture(x, w, a, b, mix, scaling), summed(x, w, a, b, mix, scaling)
    assert_same_sums(got, want)
    dy = leaf(*got.shape).detach()
    for one, other in zip(torch.autograd.grad(got, every, dy), torch.autograd.grad(want, every, dy), strict=True):
        assert_same_sums(one, other)


def test_a_weight_of_one_is_lora_linear() -> None:
    qw, x = random_quant_weight(24, 64), torch.randn(6, 64)
    (a, _), (b, _) = adapters(24, 64, [4, 4])
    with use_backend("reference"):
        want = lora_linear(x, qw, a, b, 0.5, dropout_p=0.2, seed=torch.tensor([5]))
        got = lora_mixture(x, qw, [a], [b], torch.ones(6, 1), 0.5, dropout_p=0.2, seed=torch.tensor([5]))
    assert_same_sums(got, want)


def test_gradcheck() -> None:
    def run(x: Tensor, w: Tensor, bias: Tensor, mix: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_mixture(x, w, a, b, mix, 0.7, bias, 0.3, torch.tensor([5]))

    assert torch.autograd.gradcheck(
        run, (leaf(2, 3, 12), leaf(7, 12), leaf(7), leaf(2, 1, 3), leaf(3, 2, 12), leaf(3, 7, 2))
    )


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_weights_of_zero(masked: bool) -> None:
    """They are the exact ones, or zero where weights are masked; all else has the same gradients."""
    x, w, mix = leaf(4, 12), leaf(7, 12), leaf(4, 3).detach()
    mix[:, 1], mix[0, 2] = 0.0, 0.0
    mix.requires_grad_()
    a, b = [leaf(2, 12, seed=i) for i in range(3)], [leaf(7, 2, seed=i) for i in range(3)]
    dy = leaf(4, 7, seed=3).detach()
    every = (mix, x, *a, *b)
    got = torch.autograd.grad(lora_mixture(x, w, a, b, mix, masked=masked), every, dy)
    want = torch.autograd.grad(summed(x, w, a, b, mix, [1.0] * 3), every, dy)
    assert want[0].all()
    assert_same_sums(got[0], want[0].where(mix != 0, 0.0) if masked else want[0])
    for one, other in zip(got[1:], want[1:], strict=True):
        assert_same_sums(one, other)


def test_a_weight_of_zero_leaves_its_adapter_out() -> None:
    """Whatever it holds: half loaded adapters, and a state of 0 times infinity."""
    x, w = torch.randn(4, 12), torch.randn(7, 12)
    a, b = adapters(7, 12, [2, 2])
    mix = torch.tensor([[0.5, 0.0]] * 4)
    want = lora_mixture(x, w, a[:1], b[:1], mix[:, :1])
    a[1].fill_(float("inf"))
    for masked in (True, False):
        assert_same_sums(lora_mixture(x, w, a, b, mix.clone().requires_grad_(), masked=masked).detach(), want)


@pytest.mark.parametrize("f", matrix([op.forward_op, op.backward_op], short=[op.backward_op]), ids=lambda f: f.name)
def test_opcheck(f: dispatch.Op) -> None:
    with use_backend("reference"):
        torch.library.opcheck(f.op, f.sample(torch.float32))


# ---- the public function --------------------------------------------------------------------------------------------
def test_weights_per_token_per_sequence_and_for_all() -> None:
    x, w = torch.randn(2, 5, 16), torch.randn(6, 16)
    a, b = adapters(6, 16, [2, 2, 2])
    each = torch.rand(2, 1, 3)
    got = lora_mixture(x, w, a, b, each, 2.0)
    assert got.shape == (2, 5, 6)
    assert_same_sums(got, lora_mixture(x, w, a, b, each.expand(2, 5, 3), 2.0))
    assert_same_sums(got[1:], lora_mixture(x[1:], w, a, b, each[1, 0], 2.0))
    assert_same_sums(got, lora_mixture(x, w, torch.stack(a), torch.stack(b), each, [2.0] * 3))
    assert_same_sums(got, lora_mixture(x, w, a, b, each, torch.full((3,), 2.0)))
    assert lora_mixture(x[0, 0], w, a, b, each[0, 0]).shape == (6,)
    assert lora_mixture(x[:0], w, a, b, each[:0]).shape == (0, 5, 6)


def test_the_gradient_of_shared_weights_is_a_sum() -> None:
    x, w, mix = leaf(2, 5, 12), leaf(7, 12), leaf(2, 1, 2)
    a, b = [leaf(2, 12, seed=i) for i in range(2)], [leaf(7, 2, seed=i) for i in range(2)]
    dy = leaf(2, 5, 7).detach()
    (got,) = torch.autograd.grad(lora_mixture(x, w, a, b, mix, 0.5), mix, dy)
    (want,) = torch.autograd.grad(summed(x, w, a, b, mix, [0.5] * 2), mix, dy)
    assert_same_sums(got, want)


def test_compiles_without_a_break() -> None:
    w, (a, b) = torch.randn(6, 16), adapters(6, 16, [2, 2])
    x, mix = torch.randn(4, 16, requires_grad=True), torch.rand(4, 2, requires_grad=True)
    run = torch.compile(lambda x, mix: lora_mixture(x, w, a, b, mix, 0.5), fullgraph=True, backend="aot_eager")
    want, got = lora_mixture(x, w, a, b, mix, 0.5), run(x, mix)
    assert_same_bits(got, want)
    for one, other in zip(torch.autograd.grad(got.sum(), (x, mix)), torch.autograd.grad(want.sum(), (x, mix)),
                          strict=True):  # fmt: skip
        assert_same_bits(one, other)


# ---- bad input ------------------------------------------------------------------------------------------------------
A, B = adapters(6, 16, [2, 3])
MIX = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"a": A[:1]}, ValueError, r"a and b must be two tensors, or as many tensors each, one at least, got \(1, 2\)"),
        ({"a": [], "b": []}, ValueError, r".*one at least, got \(0, 0\)"),
        ({"a": torch.ones(2, 2, 16)}, ValueError, r".*got \('a tensor', 2\)"),
        ({"a": torch.ones(2, 16), "b": torch.ones(6, 2)}, ValueError, r"a and b must be \[n, r, K\] and \[n, N, r\]"),
        ({"a": [A[0], A[1][:, :8]]}, ValueError, r"a\[1\] must be \[r, 16\] like a\[0\], got \(3, 8\)"),
        ({"b": [B[0], B[1][:, :2]]}, ValueError, r"b\[1\] must be \[6, 3\], got \(6, 2\)"),
        ({"a": [A[0], A[1].half()]}, TypeError, "a and b must be of one dtype each"),
        ({"mix": torch.ones(4, 3)}, ValueError, r"mix must be \[..., 2\], a weight of each adapter, got \(4, 3\)"),
        ({"mix": torch.ones(3, 2)}, ValueError, r"mix must be \(4, 2\), or with leading .*, got \(3, 2\)"),
        ({"mix": torch.ones(4, 2).long()}, TypeError, "mix must be a floating-point tensor"),
        ({"scaling": [1.0]}, ValueError, "scaling must be a number or 2 of them, got 1"),
        ({"scaling": torch.ones(3)}, ValueError, r"scaling must be a number or 2 of them, got \(3,\)"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must be \[6\], got \(5,\)"),
        ({"x": torch.ones(4, 8)}, ValueError, r"x must be \[..., 16\]"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, object], kind: type[Exception], text: str) -> None:
    args = {"x": torch.ones(4, 16), "weight": torch.ones(6, 16), "a": A, "b": B, "mix": MIX, "scaling": 1.0, **change}
    with pytest.raises(kind, match=f"lora_mixture: {text}"):
        lora_mixture(**args)  # type: ignore[arg-type]


def test_raw_operators_check_what_kernels_read() -> None:
    args = op.forward_op.sample(torch.float32)
    for i, wrong in ((12, args[12].double()), (12, args[12][:1]), (11, args[11][:, :1]), (10, args[10][0])):
        with pytest.raises((ValueError, TypeError), match=r"lora_mixture: (mix|a|b) must be"):
            op.forward_op.op(*args[:i], wrong, *args[i + 1 :])
    args = op.backward_op.sample(torch.float32)
    with pytest.raises(ValueError, match=r"lora_mixture_backward: s must be .* as the forward returned it"):
        op.backward_op.op(*args[:12], args[12][:1], *args[13:])
