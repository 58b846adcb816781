"""grouped_linear: every backend against float64, group by group; gradients; what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from forms import matrix
from grouped_tools import Case, check, normal
from lora_tools import BF16, F16, F32, FLOATS, level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, explain, grouped_linear, lora_linear, use_backend
from peft_kernels.ops import grouped_linear as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

level = level_fixture()
MANY = (0, 3, 3, 4, 90, 97, 640)  # no row, one, few, some for each path; more than a chunk


@needs_native
@pytest.mark.parametrize(("weight", "dtype"), matrix(
    [(w, d) for w in ("dense", "turned", "nf4", "nested") for d in FLOATS],
    lambda w, d: d is BF16 or (w, d) in (("turned", F32), ("nested", F16)),
))  # fmt: skip
def test_native(level: str, weight: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(Case(MANY, 64, 256, dtype=dtype, weight=weight, w_dtype=dtype))
    check(Case((0, 1, 2, 2, 3), 64, 256, dtype=dtype, weight=weight, w_dtype=BF16, r=9, ab=dtype))


@needs_native
@pytest.mark.parametrize("weight", ["dense", "turned"])
def test_odd_sizes(level: str, weight: str) -> None:
    torch.manual_seed(0)
    for n, k, r in ((1, 1, 1), (33, 65, 3), (100, 7, 17), (5, 130, 0)):
        check(Case((0, 2, 9, 9, 31), n, k, dtype=BF16, weight=weight, w_dtype=F32, r=r, bias=n > 1, rest=n % 2))
    check(Case((0, 0, 0), 8, 8, rest=2))
    check(Case((0, 0), 8, 8, rest=0))


@needs_native
@pytest.mark.parametrize("dtype", matrix(FLOATS, short=[BF16]))
@pytest.mark.parametrize("w_dtype", matrix(FLOATS, short=[BF16, F32]))
def test_few_rows_of_turned_weights(level: str, w_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """turned_rows.inc: one to four rows a group, without adapters."""
    torch.manual_seed(0)
    for n, k in ((1, 1), (33, 65), (256, 40), (700, 9)):
        check(Case((0, 1, 3, 6, 10, 10), n, k, dtype=dtype, weight="turned", w_dtype=w_dtype, r=0, bias=n > 1, rest=1))
    c = Case((0, 3), 700, 64, dtype=dtype, weight="turned", w_dtype=w_dtype, r=0)
    with threads(1):
        one = c.forward(op.forward_op.op)
    with threads(3):
        assert_same_bits(one, c.forward(op.forward_op.op))


@needs_native
@pytest.mark.parametrize("weight", ["dense", "turned", "nf4"])
def test_same_bits_on_any_threads_and_as_lora_linear(level: str, weight: str) -> None:
    c = Case(MANY, 64, 128, dtype=BF16, weight=weight, w_dtype=BF16)
    runs = []
    for count in (1, 2, 7):
        with threads(count):
            runs.append([c.forward(op.forward_op.op), *c.backward(op.backward_op.op)])
    for one, two, seven in zip(*runs, strict=True):
        assert_same_bits(one, two)
        assert_same_bits(one, seven)
    if weight != "dense" or c.a is None or c.b is None or c.bias is None:
        return
    for e, (first, end) in enumerate(itertools.pairwise(MANY)):
        own = lora_linear(c.x[first:end], c.weight[0][e], c.a[e], c.b[e], 0.5, c.bias[e])
        assert_same_bits(runs[0][0][first:end], own)


@needs_native
def test_native_says_why_it_cannot() -> None:
    c = Case((0, 1, 3), 8, 64, dtype=F32, weight="nested")  # 8 blocks a group, and 256 share a scale
    args = (c.x, *c.weight, c.offsets, c.n, c.a, c.b, 0.5, c.bias)
    assert "no multiple of 16384 elements" in explain("grouped_linear", *args)["native"]
    check(c)


@pytest.mark.parametrize("weight", ["dense", "turned"])
def test_gradients_of_the_public_function(weight: str) -> None:
    c = Case((0, 2, 2, 5), 6, 4, dtype=torch.float64, weight=weight, w_dtype=torch.float64, r=2, ab=torch.float64)
    leaves = [t.detach().requires_grad_() for t in (c.x, c.weight[0], c.a, c.b, c.bias)]

    def call(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return grouped_linear(x, w, c.offsets, a, b, 0.5, bias)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradcheck(lambda x: grouped_linear(x, c.weight[0], c.offsets), leaves[:1])


@needs_native
def test_gradients_in_float32() -> None:
    c = Case((0, 2, 2, 5), 6, 4)
    grads = []
    runs = ((c, "native"), (c, "reference"), (c.double(), "reference"), (c.size(), "reference"))
    for case, backend in runs:
        leaves = [t.detach().requires_grad_() for t in (case.x, case.weight[0], case.a, case.b, case.bias)]
        with use_backend(backend):
            y = grouped_linear(leaves[0], leaves[1], c.offsets, *leaves[2:4], 0.5, leaves[4])
            grads.append(torch.autograd.grad(y, leaves, case.dy))
    for mine, theirs, right, terms in zip(*grads, strict=True):
        assert_no_worse(mine, theirs, right, terms)


@needs_native
def test_a_quantised_weight_equals_its_matrices() -> None:
    w = random_quant_weight(3 * 64, 128, nested=False)
    x, offsets = normal(7, 128), torch.tensor([0, 1, 5, 7])
    got = grouped_linear(x, w, offsets)
    want = grouped_linear(x.double(), dequantize_4bit(w).view(3, 64, 128).double(), offsets)
    size = grouped_linear(x.abs().double(), dequantize_4bit(w).view(3, 64, 128).abs().double(), offsets)
    assert_no_worse(got, grouped_linear(x, dequantize_4bit(w).view(3, 64, 128), offsets), want, size)
    assert isinstance(w, QuantWeight)


@needs_native
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", matrix(FLOATS, short=[BF16]))
def test_a_quantised_weight_that_lies_transposed(dtype: torch.dtype, nested: bool) -> None:
    """Kept as [E, K, N]: y comes from the operator that gives a dx otherwise, and dx from the other one."""
    torch.manual_seed(0)
    e, k, n, r = 3, 128, 256, 5
    held = random_quant_weight(e * k, n, nested=nested)
    dense, offsets = dequantize_4bit(held).view(e, k, n), torch.tensor([0, 4, 4, 37])
    leaves = [normal(40, k, dtype=dtype), normal(e, r, k), normal(e, n, r), normal(e, n), normal(40, n, dtype=dtype)]

    def run(w: Tensor | QuantWeight, given: list[Tensor], backend: str) -> list[Tensor]:
        x, a, b, bias, dy = (t.detach().requires_grad_() for t in given)
        with use_backend(backend):
            y = grouped_linear(x, w, offsets, a, b, 0.5, bias, transposed=True)
            return [y.detach(), *torch.autograd.grad(y, (x, a, b, bias), dy)]

    mine = run(held, leaves, "native")
    for one, other in zip(mine, run(replace(held, shape=(e, k, n)), leaves, "native"), strict=True):
        assert_same_bits(one, other)
    assert not mine[0][37:].any()
    eager, exact = run(dense, leaves, "reference"), run(dense.double(), [t.double() for t in leaves], "reference")
    size = run(dense.double().abs(), [t.double().abs() for t in leaves], "reference")
    for ours, theirs, right, terms in zip(mine, eager, exact, size, strict=True):
        assert_no_worse(ours, theirs, right, terms)


def test_under_autocast_and_opcheck() -> None:
    c = Case((0, 2, 5), 6, 4)
    with torch.autocast("cpu", dtype=BF16):
        assert grouped_linear(c.x, c.weight[0], c.offsets).dtype is BF16
    torch.library.opcheck(op.forward_op.op, (c.x, *c.weight, c.offsets, 6, c.a, c.b, 0.5, c.bias))
    torch.library.opcheck(op.backward_op.op, (c.dy, c.x, *c.weight, c.offsets, c.a, c.b, 0.5, True, True))


def test_bad_input() -> None:
    x, w, offsets = torch.randn(5, 4), torch.randn(2, 6, 4), torch.tensor([0, 2, 5])
    a, b = torch.randn(2, 3, 4), torch.randn(2, 6, 3)
    four, turned = random_quant_weight(2 * 8, 64, nested=False), (None, None, 1.0, None, True)
    for match, args in (
        (r"offsets must be int64 \[E \+ 1\]", (x, w, offsets.int())),
        (r"offsets must be int64 \[E \+ 1\]", (x, w, offsets[:1])),
        (r"weight must be \[1, 6, 4\], got \(2, 6, 4\)", (x, w, offsets[:2])),
        (r"weight must be \[E, N, K\]", (x, w[0], offsets)),
        (r"weight must be a QuantWeight of shape \(E \* N, K\) for 2 groups", (x, random_quant_weight(7, 64), offsets)),
        (r"weight must be \[E, K, N\]", (x, w[0], offsets, None, None, 1.0, None, True)),
        (r"x must be \[M, 8\]", (x, four, offsets, None, None, 1.0, None, True)),
        (r"weight must be a QuantWeight of shape \(E \* K, N\)", (x, random_quant_weight(7, 64), offsets, *turned)),
        (r"a must be \[2, r, 8\]", (torch.randn(5, 8), four, offsets, a, b, *turned[2:])),
        (r"a and b must be given together", (torch.randn(5, 8), four, offsets, a, *turned[1:])),
        (r"bias must be \[2, 64\]", (torch.randn(5, 8), four, offsets, None, None, 1.0, torch.randn(2, 8), True)),
        (r"a must be \[2, r, 4\]", (x, w, offsets, a.mT, b)),
        (r"b must be \[2, 6, 3\]", (x, w, offsets, a, b.mT)),
        (r"a and b must be given together", (x, w, offsets, a)),
        (r"bias must be \[2, 6\]", (x, w, offsets, a, b, 1.0, torch.randn(6))),
        (r"x must be \[M, K\]", (x[0], w, offsets)),
    ):
        with pytest.raises((ValueError, TypeError), match=f"grouped_linear: {match}"):
            grouped_linear(*args)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "reference"])
@pytest.mark.parametrize("ends", [(1, 2, 5), (0, 4, 2), (0, 2, 6), (0, -1, 5)])
def test_offsets_that_are_none(ends: tuple[int, ...], backend: str) -> None:
    x, w = torch.randn(5, 4), torch.randn(2, 6, 4)
    with use_backend(backend), pytest.raises((ValueError, RuntimeError), match="grouped_linear: offsets must"):
        grouped_linear(x, w, torch.tensor(ends))
