"""lora_linear_stacked: native at every level and the reference against float64, and against single calls."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_draws import draw_case
from lora_tools import (
    BF16,
    F16,
    F32,
    FLOATS,
    LEVELS,
    Stack,
    at_level,
    check_stack,
    level_fixture,
    make,
    needs_native,
    saved_bytes,
    threads,
)  # fmt: skip
from torch import Tensor

import peft_kernels
from peft_kernels import BackendUnavailable, Projection, QuantWeight, lora_linear, lora_linear_stacked, use_backend
from peft_kernels.ops import lora_linear as single
from peft_kernels.ops import lora_linear_stacked as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

level = level_fixture()


def qkv(m: int, k: int, dtype: torch.dtype, p: float = 0.0, seed: int = 0, **of_all) -> Stack:
    """Different N, r, dropout and seeds; the second has a bias, the third no adapter."""
    return Stack([
        make(m, 50, k, dtype=dtype, r=16, p=p, nested=True, seed=seed, **of_all),
        make(m, 7, k, dtype=dtype, r=3, ab=BF16, p=p / 2, bias=True, seed=seed + 1, **of_all),
        make(m, 130, k, dtype=dtype, nested=True, seed=seed + 2, **of_all),
    ])  # fmt: skip


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 4, 5, 40, 97, 130])
def test_quantised(level: str, m: int, dtype: torch.dtype) -> None:
    check_stack(qkv(m, 192, dtype, p=0.25))
    check_stack(qkv(m, 1088, dtype))


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 33, 130])
def test_dense_and_4_bit_weights_of_any_layout_in_one_stack(level: str, m: int, dtype: torch.dtype) -> None:
    for k in (96, 192, 200):  # 200: blocks straddle rows
        check_stack(Stack([
            make(m, 20, k, dtype=dtype, quant="dense", w_dtype=BF16, r=4, p=0.1),
            make(m, 64, k, dtype=dtype, blocksize=64, r=16, ab=F16),
            make(m, 33, k, dtype=dtype, quant="fp4", blocksize=32, nested=True, r=5, p=0.5, seed=3),
            make(m, 9, k, dtype=dtype, quant="dense", w_dtype=F32, bias=True),
        ]))  # fmt: skip


@needs_native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    m, k = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 320))
    dtype = data.draw(st.sampled_from(FLOATS))
    cases = [draw_case(data, m, k, dtype) for _ in range(data.draw(st.integers(1, 4)))]
    with at_level(data.draw(st.sampled_from(LEVELS))):
        check_stack(Stack(cases))


@needs_native
@pytest.mark.parametrize("m", [1, 4, 6, 100, 600])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_each_projection_has_the_bits_of_a_call_of_its_own(level: str, m: int, dtype: torch.dtype) -> None:
    """So dropout, too, is each projection's own; only the sum of dx over projections is new."""
    stack = qkv(m, 576, dtype, p=0.2)
    got = stack.forward(op.forward_op.op)
    grads = stack.backward(op.backward_op.op, got[3:])
    for i, c in enumerate(stack.cases):
        y, s = c.forward(single.forward_op.op)
        assert_same_bits(got[i], y)
        assert_same_bits(got[3 + i], s)
        _, da, db = c.backward(single.backward_op.op, s if c.a is not None else None)
        if c.a is not None:
            assert_same_bits(grads[1 + i], da)
            assert_same_bits(grads[4 + i], db)


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("m", [1, 16, 128, 600])
def test_same_bits_on_one_and_two_threads_and_again(level: str, m: int, dtype: torch.dtype) -> None:
    stack = qkv(m, 576, dtype, p=0.1)
    runs = []
    for n in (1, 2, 2):
        with threads(n):
            got = stack.forward(op.forward_op.op)
            runs.append([*got, *stack.backward(op.backward_op.op, got[3:])])
    for other in runs[1:]:
        for a, b in zip(other, runs[0], strict=True):
            assert_same_bits(a, b)


@needs_native
def test_no_rows_no_outputs_and_no_inputs(level: str) -> None:
    empty = Stack([make(0, 20, 64, r=4, bias=True), make(0, 0, 64)])
    got = empty.forward(op.forward_op.op)
    assert [t.shape for t in got[:3]] == [(0, 20), (0, 0), (0, 4)]
    dx, da, _, db, _ = empty.backward(op.backward_op.op, got[2:])
    assert dx.shape == (0, 64)
    assert_same_bits(da, torch.zeros(4, 64))  # a sum over nothing
    assert_same_bits(db, torch.zeros(20, 4))
    none = Stack([make(9, 0, 64), make(9, 0, 64, r=2)])
    got = none.forward(op.forward_op.op)
    assert [t.shape for t in got[:2]] == [(9, 0), (9, 0)]
    assert_same_bits(none.backward(op.backward_op.op, got[2:])[0], torch.zeros(9, 64))


@needs_native
def test_one_gradient_without_the_other(level: str) -> None:
    stack = qkv(9, 128, BF16, p=0.1)
    ss = stack.forward(op.forward_op.op)[3:]
    both = stack.backward(op.backward_op.op, ss)
    only_dx, only_ab = (stack.backward(op.backward_op.op, ss, *need) for need in ((True, False), (False, True)))
    assert_same_bits(only_dx[0], both[0])
    assert all(t.numel() == 0 for t in [*only_dx[1:], only_ab[0]])
    for a, b in zip(only_ab[1:], both[1:], strict=True):
        assert_same_bits(a, b)


@pytest.mark.slow
@needs_native
def test_opcheck() -> None:
    stack = qkv(5, 64, F32, p=0.1)
    rows = [(*c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed) for c in stack.cases]
    lists = list(map(list, zip(*rows, strict=True)))
    with use_backend("native"):
        torch.library.opcheck(op.forward_op.op, (stack.cases[0].x, *lists))
        calls: list[tuple] = []
        stack.backward(lambda *args: calls.append(args), op.forward_op.op(stack.cases[0].x, *lists)[3:])
        torch.library.opcheck(op.backward_op.op, calls[0])


# ---- the public function ------------------------------------------------------------------------------------------
def projections(dtype: torch.dtype, k: int = 64, p: float = 0.0) -> list[Projection]:
    """4-bit with an adapter; dense and trained with a bias; 4-bit alone."""

    def leaf(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).to(of).requires_grad_()

    wide = torch.promote_types(dtype, F32)
    return [
        Projection(random_quant_weight(24, k), leaf(4, k, of=wide), leaf(24, 4, scale=0.1, of=wide), 0.5, None, p,
                   torch.tensor([3]) if p else None),
        Projection(leaf(16, k, scale=0.1), leaf(2, k), leaf(16, 2, scale=0.1), 2.0, leaf(16), p / 2,
                   torch.tensor([4]) if p else None),
        Projection(random_quant_weight(40, k, seed=5, nested=True)),
    ]  # fmt: skip


def trained(parts: Sequence[Projection]) -> list[Tensor]:
    return [t for p in parts for t in p if isinstance(t, Tensor) and t.requires_grad]


def in_double(parts: Sequence[Projection]) -> list[Projection]:
    def up(t: object) -> object:
        is_float = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().double().requires_grad_() if is_float else t

    return [Projection(*map(up, p)) for p in parts]


def run(parts: Sequence[Projection], x: Tensor, dys: Sequence[Tensor], stacked: bool = True) -> list[Tensor]:
    x = x.detach().requires_grad_()
    ys = lora_linear_stacked(x, parts) if stacked else [lora_linear(x, *p) for p in parts]
    loss = sum((y * dy.to(y.dtype)).sum() for y, dy in zip(ys, dys, strict=True))
    return [*(y.detach() for y in ys), *torch.autograd.grad(loss, [x, *trained(parts)])]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_the_public_function(dtype: torch.dtype) -> None:
    parts = projections(dtype, p=0.2)
    x, dys = torch.randn(3, 4, 64).to(dtype), [torch.randn(3, 4, n).to(dtype) for n in (24, 16, 40)]
    got = run(parts, x, dys)
    with use_backend("reference"):
        eager = run(parts, x, dys, stacked=False)
        want = run(in_double(parts), x.double(), dys, stacked=False)
    assert len(got) == 3 + 1 + 6
    for mine, theirs, exact in zip(got, eager, want, strict=True):
        assert_no_worse(mine, theirs, exact, exact.abs().max().expand_as(exact))


def test_gradcheck() -> None:
    parts = in_double(projections(F32, k=64, p=0.3))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)

        def taken(p: Projection) -> Projection:
            return Projection(*(next(left) if isinstance(t, Tensor) and t.requires_grad else t for t in p))

        return lora_linear_stacked(x, list(map(taken, parts)))

    assert torch.autograd.gradcheck(f, (x, *trained(parts)), fast_mode=True)


@needs_native
@pytest.mark.parametrize("unused", [0, 1, 2])
def test_a_projection_that_nobody_used_has_no_gradient(unused: int) -> None:
    parts = projections(F32)
    x = torch.randn(5, 64, requires_grad=True)
    used = [i for i in range(3) if i != unused]
    ys = lora_linear_stacked(x, parts)
    sum(ys[i].sum() for i in used).backward()
    mine = [x.grad, *(t.grad for t in trained(parts))]
    want = torch.autograd.grad(sum(lora_linear(x, *parts[i]).sum() for i in used), [x, *trained(parts)],
                               allow_unused=True)  # fmt: skip
    assert [t is None for t in mine] == [t is None for t in want]
    for t, u in zip(mine[1:], want[1:], strict=True):
        if u is not None:
            assert_same_bits(t, u)


@needs_native
def test_seeds_are_drawn_in_order() -> None:
    """The masks of a stack are those of its projections called one after the other."""
    parts = [Projection(random_quant_weight(8, 64), torch.randn(2, 64), torch.randn(8, 2), 1.0, None, p)
             for p in (0.2, 0.0, 0.4)]  # fmt: skip
    x = torch.randn(6, 64)
    torch.manual_seed(5)
    want = [lora_linear(x, *p) for p in parts]
    torch.manual_seed(5)
    for got, y in zip(lora_linear_stacked(x, parts), want, strict=True):
        assert_same_bits(got, y)


@needs_native
def test_saved_for_the_backward_is_x_once_and_the_small_sums() -> None:
    parts, x = projections(BF16), torch.randn(200, 64, dtype=BF16, requires_grad=True)
    packed = [t for p in parts if isinstance(p.weight, QuantWeight) for t in p.weight.flatten()]
    ys: list[Tensor] = []
    kept = saved_bytes(lambda: ys.extend(lora_linear_stacked(x, parts)), [*trained(parts), *packed])
    assert kept == 200 * (64 * 2 + (4 + 2) * 4)
    assert len(ys) == 3


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    parts = projections(F32, p=0.2)
    x, dys = torch.randn(5, 64), [torch.randn(5, n) for n in (24, 16, 40)]
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear_stacked, backend="aot_eager", fullgraph=True)
    want = run(parts, x, dys)
    z = x.detach().requires_grad_()
    ys = compiled(z, parts)
    loss = sum((y * dy).sum() for y, dy in zip(ys, dys, strict=True))
    for got, exact in zip([*ys, *torch.autograd.grad(loss, [z, *trained(parts)])], want, strict=True):
        assert_same_bits(got.detach(), exact)


@needs_native
def test_native_takes_16_projections() -> None:
    with use_backend("native"), pytest.raises(BackendUnavailable, match="more than 16 projections"):
        lora_linear_stacked(torch.randn(3, 64), [Projection(random_quant_weight(8, 64))] * 17)


def test_bad_input() -> None:
    x, q = torch.randn(3, 64), random_quant_weight(8, 64)
    with pytest.raises(ValueError, match="lora_linear_stacked: projections must be at least one Projection, got 0"):
        lora_linear_stacked(x, [])
    with pytest.raises(ValueError, match=r"projections\[1\] must be a projection whose weight is \[N, 64\], got"):
        lora_linear_stacked(x, [Projection(q), Projection(torch.randn(8, 32))])
    with pytest.raises(ValueError, match=r"lora_linear: a must be \[r, 64\], got \(2, 63\)"):
        lora_linear_stacked(x, [Projection(q), Projection(q, torch.randn(2, 63), torch.randn(8, 2))])
    with pytest.raises(ValueError, match="lists must be of one length"):
        op.forward_op.op(x, *[[] for _ in range(15)])
    with pytest.raises(RuntimeError, match="records no gradients"):
        op.forward_op.op(x, *op.lists_of(op.flat_projections("", x, projections(F32), "abc", 64), 3))
    assert peft_kernels.explain("lora_linear_stacked", x, *op.lists_of(op.flat_projections(
        "", x, [Projection(q)], ["q"], 64), 1))["reference"] in ("able", "chosen")  # fmt: skip
