"""multi_lora_linear: the reference against lora_linear row by row and its gradients; the public function; bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from multi_tools import make_multi, make_stack
from torch import Tensor

from peft_kernels import AdapterStack, lora_linear, multi_lora_linear, use_backend
from peft_kernels.ops import multi_lora_linear as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

F64 = torch.float64


def adapter(stack: AdapterStack, i: int) -> tuple[Tensor, Tensor, float]:
    """(A [r, K], B [N, r], scaling) of adapter i."""
    own = slice(int(stack.starts[i]), int(stack.starts[i] + stack.ranks[i]))
    return stack.a[own], stack.b[own].t(), float(stack.scaling[i])


# ---- the reference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quant", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_reference_is_lora_linear_of_each_adapter(quant: str, p: float) -> None:
    """In float64: every row as lora_linear of its adapter gives it, with one dropout mask, and its gradients."""
    c = make_multi(9, 7, 64, [3, 0, 5], quant=quant, p=p, bias=True, adapters=[0, 2, 2, -1, 1, 0, -1, 2, 2]).double()
    size = c.magnitudes()
    with use_backend("reference"):
        y, s = c.forward(op.forward_op.op)
        dx, da, db = c.backward(op.backward_op.op, s)
        sizes = size.forward(op.forward_op.op)
        grad_sizes = size.backward(op.backward_op.op, sizes[1])
        want = [torch.zeros_like(t) for t in (y, s, dx, da, db)]
        for i in (-1, 0, 1, 2):
            rows = c.adapters == i
            x = c.base.x.clone().requires_grad_()
            a, b, scaling = adapter(c.stack, i) if i >= 0 else (None, None, 1.0)
            if a is not None and b is not None:
                a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
            flat, w = c.base.weight, c.base.weight[0]
            if quant == "nf4":
                w = replace(random_quant_weight(7, 64), packed=flat[0], absmax=flat[1])
            out = lora_linear(x, w, a, b, scaling, c.base.bias, p, c.base.seed)
            want[0][rows] = out.detach()[rows]
            out[rows].backward(c.base.dy[rows])
            want[2] += x.grad
            if a is not None and b is not None and a.shape[0]:
                own = slice(int(c.stack.starts[i]), int(c.stack.starts[i]) + a.shape[0])
                want[3][own], want[4][own] = a.grad, b.grad.t()
                want[1][rows, : a.shape[0]] = op.dropped(c.base.x, p, c.base.seed)[rows] @ a.detach().t()
    for got, exact, bound in zip((y, s, dx, da, db), want, (*sizes, *grad_sizes), strict=True):
        assert_no_worse(got, exact, exact, bound)


def test_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).requires_grad_()

    free = (leaf(0, 12), leaf(7, 0), 1.0)

    def run(x: Tensor, w: Tensor, bias: Tensor, *ab: Tensor) -> Tensor:
        stack = AdapterStack.pack([(ab[0], ab[1], 0.5), free, (ab[2], ab[3], 2.0)])
        return multi_lora_linear(x, w, stack, torch.tensor([0, 2, -1, 1, 2, 2]), bias, 0.3, torch.tensor([5]))

    assert torch.autograd.gradcheck(
        run, (leaf(2, 3, 12), leaf(7, 12), leaf(7), leaf(3, 12), leaf(7, 3), leaf(5, 12), leaf(7, 5))
    )


@pytest.mark.parametrize("m", [1, 9])
def test_opcheck(m: int) -> None:
    c = make_multi(m, 24, 64, [4, 2], p=0.1, bias=True)
    c = replace(c, stack=replace(c.stack, a=c.stack.a.nan_to_num(), b=c.stack.b.nan_to_num()))
    with use_backend("reference"):
        c.forward(lambda *args: torch.library.opcheck(op.forward_op.op, args))
        _, s = c.forward(op.forward_op.op)
        c.backward(lambda *args: torch.library.opcheck(op.backward_op.op, args), s)


# ---- the public function --------------------------------------------------------------------------------------------
def test_an_index_per_row_or_per_sequence() -> None:
    stack, w = make_stack(6, 16, [2, 3]), torch.randn(6, 16)
    x = torch.randn(2, 5, 16)
    per_sequence = multi_lora_linear(x, w, stack, torch.tensor([1, -1]))
    per_row = multi_lora_linear(x.reshape(10, 16), w, stack, torch.tensor([1] * 5 + [-1] * 5))
    assert per_sequence.shape == (2, 5, 6)
    assert_same_bits(per_sequence.reshape(10, 6), per_row)
    packed = multi_lora_linear(x.reshape(1, 10, 16), w, stack, torch.tensor([1] * 5 + [-1] * 5))
    assert_same_bits(packed.reshape(10, 6), per_row)
    assert multi_lora_linear(x[0, 0], w, stack, torch.tensor([0])).shape == (6,)
    assert multi_lora_linear(x[:0], w, stack, torch.tensor([], dtype=torch.int64)).shape == (0, 5, 6)


def test_a_stack_may_be_overwritten_between_calls() -> None:
    stack, w, x = make_stack(6, 16, [2, 3]), torch.randn(6, 16), torch.randn(4, 16)
    rows = torch.tensor([0, 1, 0, -1])
    first = multi_lora_linear(x, w, stack, rows)
    rows.copy_(torch.tensor([-1, -1, -1, 0]))
    assert_same_bits(multi_lora_linear(x, w, stack, rows)[:3], multi_lora_linear(x, w, stack, torch.full((4,), -1))[:3])
    rows.copy_(torch.tensor([0, 1, 0, -1]))
    stack.ranks[0] = 0  # a free slot
    freed = multi_lora_linear(x, w, stack, rows)
    assert_same_bits(freed[1], first[1])
    assert_same_bits(freed[0], multi_lora_linear(x, w, stack, torch.full((4,), -1))[0])


def test_compiles_without_a_break() -> None:
    stack, w = make_stack(6, 16, [2, 3]), torch.randn(6, 16)
    x, rows = torch.randn(4, 16, requires_grad=True), torch.tensor([0, 1, 0, -1])
    run = torch.compile(lambda x: multi_lora_linear(x, w, stack, rows), fullgraph=True, backend="aot_eager")
    want = multi_lora_linear(x, w, stack, rows)
    got = run(x)
    assert_same_bits(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x), strict=True):
        assert_same_bits(a, b)


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "rows", "kind", "text"),
    [
        ({}, [0, 2], ValueError, r"adapters must be -1 \(the base\) or an index below 2, got 2"),
        ({}, [-2, 0], ValueError, r"adapters must be -1 \(the base\) or an index below 2, got -2"),
        ({}, [0, 1, 0], ValueError, r"adapters must be \[2\], one index per row of x"),
        ({"max_rank": 1}, [0, 0], ValueError, r"ranks\[0\] must be between 0 and max_rank = 1, got 2"),
        ({"ranks": torch.tensor([-1, 3])}, [0, 0], ValueError, r"ranks\[0\] must be between 0"),
        ({"starts": torch.tensor([7, 1])}, [0, 0], ValueError, r"starts\[0\] must be such that 2 rows are among the 8"),
        ({"starts": torch.tensor([-1, 1])}, [0, 0], ValueError, r"starts\[0\] must be such that 2 rows"),
        ({"starts": torch.zeros(2)}, [0, 0], TypeError, r"starts must be torch.int64, got torch.float32"),
        ({"scaling": torch.ones(2).double()}, [0, 0], TypeError, r"scaling must be torch.float32"),
        ({"scaling": torch.ones(3)}, [0, 0], ValueError, r"starts, ranks and scaling must be \[S\] each"),
        ({"a": torch.ones(8, 15)}, [0, 0], ValueError, r"a must be \[P, 16\], got \(8, 15\)"),
        ({"b": torch.ones(6, 8)}, [0, 0], ValueError, r"b must be \[8, 6\] \(lora_B transposed\), got \(6, 8\)"),
        ({"b": torch.ones(8, 6, dtype=torch.int64)}, [0, 0], TypeError, "b must be a floating-point"),
        ({"max_rank": -1}, [-1, -1], ValueError, "max_rank must be at least 0"),
        ({"max_rank": 10**9}, [0, 0], ValueError, "max_rank must be at most 65536: for each row of x"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_arguments(change, rows, kind, text: str, grad: bool) -> None:
    stack, w = replace(make_stack(6, 16, [2, 3]), **change), torch.randn(6, 16)
    with pytest.raises(kind, match=text):
        multi_lora_linear(torch.randn(2, 16, requires_grad=grad), w, stack, torch.tensor(rows))


def test_adapters_that_share_rows_have_no_gradients() -> None:
    stack, w = replace(make_stack(6, 16, [3, 3]), starts=torch.tensor([1, 2])), torch.randn(6, 16)
    stack.a.nan_to_num_()
    stack.b.nan_to_num_().requires_grad_()
    y = multi_lora_linear(torch.randn(2, 16), w, stack, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="starts must be such that adapters share no rows, got 1 and 2 of 0 and 1"):
        y.sum().backward()
    y = multi_lora_linear(torch.randn(2, 16), w, stack, torch.tensor([1, 1]))
    y.sum().backward()  # one of them alone


@pytest.mark.parametrize(
    ("adapters", "text"),
    [
        ([], r"adapters must be at least one"),
        ([(torch.ones(2, 8), torch.ones(4, 3), 1.0)], r"adapters\[0\] must be A \[r, 8\] and B \[4, r\]"),
        ([(torch.ones(2, 8), torch.ones(4, 2), 1.0), (torch.ones(2, 9), torch.ones(4, 2), 1.0)], r"adapters\[1\] must"),
    ],
)
def test_pack_refuses(adapters, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AdapterStack.pack(adapters)
