"""Prepared calls with gradients: what the public function gives, with hooks, with what is unused, and when they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from lora_tools import BF16, F32, needs_native
from torch import Tensor

from peft_kernels import (
    PreparedCall,
    Projection,
    RowPlan,
    RowProjection,
    dora_linear_normed,
    gated_mlp,
    layer_norm,
    lora_linear,
    lora_linear_by_row,
    lora_linear_stacked,
    rms_norm,
    use_backend,
)
from peft_kernels.testing import assert_same_bits, random_quant_weight

pytestmark = needs_native
K = 64


class Case(NamedTuple):
    """A function of several layers or one. arguments: beside x. leaves: those of them that are trained."""

    function: Callable[..., Any]
    arguments: list[Any]
    leaves: list[Tensor]

    def public(self, x: Tensor) -> list[Tensor]:
        several = self.function in (lora_linear_stacked, lora_linear_by_row)
        y = self.function(x, self.arguments) if several else self.function(x, *self.arguments)
        return [y] if isinstance(y, Tensor) else [*y]

    def prepared(self, call: PreparedCall, x: Tensor) -> list[Tensor]:
        y = call(x, *self.arguments)
        return [y] if isinstance(y, Tensor) else [*y]


def leaf(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return (torch.randn(shape) * 0.2).to(dtype).requires_grad_()


def lora(p: float) -> Case:
    a, b = leaf(4, K), leaf(24, 4)
    return Case(lora_linear, [random_quant_weight(24, K), a, b, 0.5, torch.randn(24), p], [a, b])


def dora(p: float) -> Case:
    a, b, magnitude = leaf(4, K), leaf(24, 4), torch.rand(24).requires_grad_()
    given = [torch.randn(24, K), a, b, magnitude, 0.5, None, p]
    return Case(dora_linear_normed, given, [a, b, magnitude])


def stacked(p: float) -> Case:
    a, b, c, d = leaf(4, K), leaf(24, 4), leaf(2, K, dtype=BF16), leaf(16, 2, dtype=BF16)
    parts = [
        Projection(random_quant_weight(24, K, nested=True), a, b, 0.5, None, p),
        Projection(random_quant_weight(40, K, seed=5), bias=torch.randn(40)),
        Projection(torch.randn(16, K), c, d, 2.0, torch.randn(16), p / 2),
    ]
    return Case(lora_linear_stacked, parts, [a, b, c, d])


def by_row(p: float) -> Case:
    a, b = [leaf(4, K), leaf(2, K)], [leaf(24, 4), leaf(24, 2)]
    c, d = [leaf(3, K, dtype=BF16)], [leaf(16, 3, dtype=BF16)]
    parts = [
        RowProjection(random_quant_weight(24, K), a, b, [0.5, 2.0], RowPlan([0, -1, 1]), torch.randn(24), p),
        RowProjection(torch.randn(16, K), c, d, [1.5], RowPlan([-1, 0, 0]), None, p / 2),
    ]
    return Case(lora_linear_by_row, parts, [*a, *b, *c, *d])


def mlp(p: float) -> Case:
    a, b, c, d = leaf(4, K), leaf(24, 4), leaf(2, 24, dtype=BF16), leaf(40, 2, dtype=BF16)
    gate = Projection(random_quant_weight(24, K, nested=True), a, b, 0.5, torch.randn(24), p)
    up, down = Projection(torch.randn(24, K)), Projection(random_quant_weight(40, 24), c, d, 2.0, None, p / 2)
    return Case(gated_mlp, [gate, up, down, "gelu"], [a, b, c, d])


def fused_mlp(p: float) -> Case:
    """Gate and up as one, and no adapter behind them."""
    a, b = leaf(4, K), leaf(48, 4)
    gate = Projection(random_quant_weight(48, K), a, b, 0.5, None, p)
    return Case(gated_mlp, [gate, None, Projection(torch.randn(40, 24)), "silu", "pairs", None, 2.0, 1.0], [a, b])


def rms(p: float) -> Case:
    return Case(rms_norm, [torch.randn(K).to(BF16), 1e-5, 1.0], [])


def layer(p: float) -> Case:
    return Case(layer_norm, [torch.randn(K), torch.randn(K), 1e-5], [])


CASES = [lora, dora, stacked, by_row, mlp, fused_mlp, rms, layer]
each_case = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)


def results(ys: Sequence[Tensor], x: Tensor, leaves: Sequence[Tensor], unused: int | None = None) -> list[Any]:
    """Outputs, and the gradients of x and of the leaves, where output `unused` is not looked at."""
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(y.shape, generator=g).to(y.dtype) for y in ys]
    total = sum((y * w).sum() for i, (y, w) in enumerate(zip(ys, weights, strict=True)) if i != unused)
    return [*(y.detach() for y in ys), *torch.autograd.grad(total, [x, *leaves], allow_unused=True)]  # type: ignore[arg-type]


def same(case: Case, call: PreparedCall, x: Tensor, unused: int | None = None, prepared: bool = True) -> None:
    """The prepared call gives what the public function does from the same random numbers, bit for bit but by row."""
    found = []
    for run in (case.public, lambda x: case.prepared(call, x)):
        torch.manual_seed(7)
        leaf_x = x.detach().requires_grad_()
        found.append(results(run(leaf_x), leaf_x, case.leaves, unused))
    assert (call._last[True] is not None) is prepared
    for expected, got in zip(*found, strict=True):
        assert (got is None) is (expected is None)
        if got is not None and case.function is lora_linear_by_row:  # each operator's dx is rounded, the sum is not
            close = 5e-2 if got.dtype is BF16 else 1e-5
            torch.testing.assert_close(got, expected, rtol=close, atol=close)
        elif got is not None:
            assert_same_bits(got, expected)


@each_case
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_as_the_public_function(make: Callable[[float], Case], p: float) -> None:
    case = make(p)
    call = PreparedCall(case.function)
    same(case, call, torch.randn(3, 2, K))
    first = call._last[True]
    same(case, call, torch.randn(3, 2, K))
    with torch.no_grad():
        for t in case.leaves:  # values may change: the kernel reads them at each call
            t.mul_(0.5)
    same(case, call, torch.randn(2, 3, K).transpose(0, 1))
    assert call._last[True] is first
    same(case, call, torch.randn(3, 2, K).to(BF16))
    same(case, call, torch.randn(3, K).to(BF16))


@each_case
def test_saved_tensors_that_hooks_put_elsewhere(make: Callable[[float], Case]) -> None:
    case = make(0.3)
    call = PreparedCall(case.function)
    same(case, call, torch.randn(3, K))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        same(case, call, torch.randn(3, K))


@pytest.mark.parametrize("make", [stacked, by_row], ids=["stacked", "by row"])
def test_an_output_that_nobody_used(make: Callable[[float], Case]) -> None:
    case = make(0.3)
    call = PreparedCall(case.function)
    for unused in range(len(case.arguments)):
        same(case, call, torch.randn(3, K), unused)


@each_case
def test_gradients_of_some_alone(make: Callable[[float], Case]) -> None:
    case = make(0.0)
    call = PreparedCall(case.function)
    for i, t in enumerate(case.leaves):
        t.requires_grad_(False)
        kept = [other for j, other in enumerate(case.leaves) if j != i]
        same(case._replace(leaves=kept), call, torch.randn(3, K))
        t.requires_grad_()


@each_case
def test_tensors_in_other_places(make: Callable[[float], Case]) -> None:
    case = make(0.0)
    call = PreparedCall(case.function)
    same(case, call, torch.randn(3, K))
    for t in case.leaves:
        t.data = torch.randn_like(t)
        same(case, call, torch.randn(3, K))
    for t in case.leaves[:1]:
        t.data = t.data.t().contiguous().t()  # by columns, which the kernel cannot read in place
        same(case, call, torch.randn(3, K), prepared=False)


@each_case
def test_what_is_not_prepared(make: Callable[[float], Case]) -> None:
    case = make(0.0)
    call = PreparedCall(case.function)
    x = torch.randn(3, K)
    with use_backend("reference"):
        same(case, call, x, prepared=False)
    same(case, call, x)
    first = case.arguments[0]
    weight = next(t for t in (first if isinstance(first, tuple) else case.arguments) if t is not None)
    frozen = weight if isinstance(weight, Tensor) else None
    if frozen is not None:
        frozen.requires_grad_()
        same(case, call, x, prepared=False)


def test_rows_that_do_not_fit() -> None:
    case = by_row(0.0)
    call = PreparedCall(lora_linear_by_row)
    same(case, call, torch.randn(3, K))
    with pytest.raises(ValueError, match="of 2 rows like x"):
        case.prepared(call, torch.randn(2, K))
    with torch.no_grad():
        assert call(torch.randn(3, K), *case.arguments) is None
    nothing = RowProjection(torch.randn(16, 0), [leaf(3, 0)], [leaf(16, 3)], [1.0], RowPlan([0, 0]))
    assert lora_linear_by_row(torch.randn(2, 0).requires_grad_(), [nothing]) is None  # x without columns


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_operator() -> None:
    call, (w, a, b) = PreparedCall(lora_linear), (torch.randn(s) for s in ((24, 16), (4, 16), (24, 4)))
    x, y = torch.randn(2, 5, 16)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: call(x, w, a, b, 0.5), x, check_trace=False)
        exact = y.double() @ w.double().t() + 0.5 * (y.double() @ a.double().t()) @ b.double().t()
        assert (traced(y) - exact).norm() < 1e-5 * exact.norm()
