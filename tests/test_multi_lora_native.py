"""multi_lora_linear on the native CPU library at every level, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from forms import grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_draws import draw_multi
from lora_tools import BF16, F16, F32, FLOATS, LEVELS, at_level, level_fixture, make, needs_native, threads
from multi_tools import MultiCase, check_multi, make_multi, make_stack
from torch import Tensor

from peft_kernels import AdapterStack, PreparedCall, QuantWeight, multi_lora_linear, native, use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.ops import lora_linear as single
from peft_kernels.ops import multi_lora_linear as op
from peft_kernels.ops.lora_linear.native import pack
from peft_kernels.ops.multi_lora_linear.native import Layer, backward_layers, forward_layers, pack_layer
from peft_kernels.testing import assert_no_worse, assert_same_bits

level = level_fixture()


# ---- shapes: M picks the kernel (GEMV, codes in registers, panels, chunks), N and K its edges ------------------------
RANKS = (3, 16, 0, 37)


@needs_native
@pytest.mark.parametrize("quant", ["nf4", "dense"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 5, 33, 130])
def test_rows(level: str, m: int, dtype: torch.dtype, quant: str) -> None:
    for n, k, ab in ((64, 64, F32), (50, 192, BF16), (33, 77, F16)):
        check_multi(make_multi(m, n, k, RANKS, dtype=dtype, quant=quant, w_dtype=dtype, ab=ab, nested=True, bias=True))
        check_multi(make_multi(m, n, k, RANKS, dtype=dtype, quant=quant, w_dtype=dtype, ab=ab, p=0.25, max_rank=40))


@needs_native
def test_rows_of_eight_adapters_and_more(level: str) -> None:
    """From there on a 4-bit weight has a row of x a lane, where x is not bfloat16."""
    for dtype, k, ab, p in ((F32, 192, BF16, 0.0), (F16, 96, F32, 0.25), (F32, 77, F32, 0.0)):
        check_multi(make_multi(46, 50, k, RANKS * 3, dtype=dtype, ab=ab, nested=True, bias=True, p=p))


@needs_native
@pytest.mark.parametrize("adapters", [[0] * 600, [2, 1] * 300, [1] * 200 + [-1] * 200 + [0] * 200, [-1] * 599 + [2]])
def test_more_rows_than_a_chunk(level: str, adapters: list[int]) -> None:
    for dtype in (F32, BF16):
        check_multi(make_multi(600, 50, 96, [5, 2, 9], adapters=adapters, dtype=dtype, p=0.1))


@needs_native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    m, k = data.draw(st.integers(0, 80)), data.draw(st.integers(1, 200))
    case = draw_multi(data, m, k, data.draw(st.sampled_from(FLOATS)))
    with at_level(data.draw(st.sampled_from(LEVELS))):
        check_multi(case)


@needs_native
def test_a_prepared_call_gives_the_same_bits() -> None:
    def prepared(c: MultiCase) -> tuple[PreparedCall, tuple[Any, ...]]:
        base, w = c.base, c.base.weight[0]
        if base.weight[5]:
            packed, absmax, nested_absmax, nested_code, offset, _, blocksize, nested_blocksize = base.weight
            w = QuantWeight(packed, absmax, (base.n, base.x.shape[1]), "nf4", blocksize, F32, nested_absmax,
                            nested_code, nested_blocksize, offset)  # fmt: skip
        return PreparedCall(multi_lora_linear), (w, c.stack, c.adapters, base.bias)

    nf4 = make_multi(33, 50, 192, RANKS, nested=True, bias=True)
    for c in (nf4, make_multi(3, 33, 77, RANKS, quant="dense")):
        call, given = prepared(c)
        with torch.no_grad():
            for x in (c.base.x, c.base.x.flip(0), torch.stack([c.base.x] * 2, 1)[:, 0], c.base.x[None]):
                assert_same_bits(call(x, *given), multi_lora_linear(x, *given))
                assert call._last[False] is not None
                c.adapters.neg_().clamp_(-1)  # what is in the others may change
            with pytest.raises(ValueError, match="adapters"):
                call(c.base.x[:1], *given)
    turned = replace(c, stack=replace(c.stack, a=c.stack.a.t().contiguous().t()))
    call, given = prepared(turned)
    with torch.no_grad():
        assert_same_bits(call(c.base.x, *given), multi_lora_linear(c.base.x, *given))
        assert call._last[False] is None
        with use_backend("reference"):
            call(c.base.x, *given)
        assert call._last[False] is None


# ---- what it is ---------------------------------------------------------------------------------------------------
@needs_native
@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_of_the_base_have_its_bits(level: str, m: int, dtype: torch.dtype) -> None:
    """-1, a free slot and a batch without any adapter: what lora_linear gives without one."""
    c = make_multi(m, 50, 64, [0, 4], adapters=[-1, 0] * (m // 2), dtype=dtype, bias=True, p=0.5)
    base = c.base
    y, s = c.forward(op.forward_op.op)
    assert_same_bits(y, base.forward(single.forward_op.op)[0])
    assert not s.any()
    dx, da, db = c.backward(op.backward_op.op, s)
    assert_same_bits(dx, base.backward(single.backward_op.op, None)[0])
    assert not da.any()
    assert not db.any()
    mixed = replace(c, adapters=torch.tensor([-1, 1] * (m // 2))).forward(op.forward_op.op)[0]
    assert_no_worse(mixed[::2], y[::2], base.double().forward(single.forward_op.reference)[0][::2],
                    c.magnitudes().base.forward(single.forward_op.reference)[0][::2])  # fmt: skip


@needs_native
@pytest.mark.parametrize("m", [3, 40, 130])
def test_a_row_does_not_depend_on_its_neighbours(level: str, m: int) -> None:
    """Rows may be given in any order: answers to a request do not depend on the batch it came in."""
    c = make_multi(m, 50, 128, [4, 7, 2], dtype=BF16, bias=True)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    moved = MultiCase(replace(c.base, x=c.base.x[order], dy=c.base.dy[order]), c.stack, c.adapters[order])
    (y, s), (y_moved, s_moved) = c.forward(op.forward_op.op), moved.forward(op.forward_op.op)
    assert_same_bits(y_moved, y[order])
    assert_same_bits(s_moved, s[order])
    assert_same_bits(moved.backward(op.backward_op.op, s_moved)[0], c.backward(op.backward_op.op, s)[0][order])


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("m", [1, 4, 16, 128, 600])
def test_same_bits_on_one_and_two_threads_and_again(level: str, m: int, dtype: torch.dtype) -> None:
    c = make_multi(m, 200, 576, [16, 3, 8, 16], dtype=dtype, p=0.1, nested=True, bias=True)
    runs = []
    for n in (1, 2, 2):
        with threads(n):
            y, s = c.forward(op.forward_op.op)
            runs.append((y, s, *c.backward(op.backward_op.op, s)))
    for other in runs[1:]:
        for got, want in zip(other, runs[0], strict=True):
            assert_same_bits(got, want)


@needs_native
def test_one_gradient_without_the_other(level: str) -> None:
    c = make_multi(9, 40, 128, [4, 6], dtype=BF16, p=0.1)
    _, s = c.forward(op.forward_op.op)
    dx, da, db = c.backward(op.backward_op.op, s)
    only_dx, only_ab = c.backward(op.backward_op.op, s, need_ab=False), c.backward(op.backward_op.op, s, need_dx=False)
    assert_same_bits(only_dx[0], dx)
    assert_same_bits(only_ab[1], da)
    assert_same_bits(only_ab[2], db)
    assert only_dx[1].numel() == only_dx[2].numel() == only_ab[0].numel() == 0


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_of_rows_that_no_adapter_of_the_batch_owns_are_zero(level: str, dtype: torch.dtype) -> None:
    """An adapter without rows of x, a hole in the stack and a free slot; and nothing but the base."""
    starts, ranks = torch.tensor([0, 5, 12, 3]), torch.tensor([3, 4, 2, 0])
    scaling, n, k = torch.ones(4), 40, 128
    weight, a, b = torch.randn(n, k), torch.randn(14, k, dtype=dtype), torch.randn(14, n, dtype=dtype)
    for adapters, owned in (([0, 2, -1, 3, 2], [0, 1, 2, 12, 13]), ([-1, 3, 3, -1, -1], [])):
        x, dy = torch.randn(5, k), torch.randn(5, n)
        args = (weight, None, None, None, None, 0, 64, 256)
        plan = (torch.tensor(adapters), starts, ranks, scaling, 4)
        with use_backend("native"):
            _, s = op.forward_op.op(x, *args, n, a, b, *plan, None, 0.0, None)
            _, da, db = op.backward_op.op(dy, x, *args, a, b, s, *plan, 0.0, None, True, True)
        others = [i for i in range(14) if i not in owned]
        for grad in (da, db):
            assert_same_bits(grad[others], torch.zeros_like(grad[others]))
            assert grad[owned].abs().min(1).values.max() > 0 if owned else True


@needs_native
def test_tensors_of_any_stride(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = make_multi(6, 24, 64, [8, 3])
    _, s = want = c.forward(op.forward_op.op)
    grads = c.backward(op.backward_op.op, s)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0]

    stack = AdapterStack(*map(strided, (c.stack.a, c.stack.b, c.stack.starts, c.stack.ranks, c.stack.scaling)), 8)
    moved = MultiCase(c.base, stack, strided(c.adapters))
    for got, expected in zip(moved.forward(op.forward_op.op), want, strict=True):
        assert_same_bits(got, expected)
    for got, expected in zip(moved.backward(op.backward_op.op, strided(s)), grads, strict=True):
        assert_same_bits(got, expected)
    c = make_multi(35, 64, 64, [8, 3], quant="dense", w_dtype=F32)
    weight, *other = c.base.weight
    turned = replace(c, base=replace(c.base, weight=(weight.t().contiguous().t(), *other)))
    _, s = want = c.forward(op.forward_op.op)
    grads = c.backward(op.backward_op.op, s)
    library, others = native.cpu(), []

    def cpu() -> Any:  # a copy of the weight that nobody holds is something else by now
        others.extend(torch.full((64, 64), float("nan")) for _ in range(8))
        return library

    monkeypatch.setattr(native, "cpu", cpu)
    for got, expected in zip(turned.forward(op.forward_op.op), want, strict=True):
        assert_same_bits(got, expected)
    for got, expected in zip(turned.backward(op.backward_op.op, s), grads, strict=True):
        assert_same_bits(got, expected)


# ---- adapters in tensors of their own -------------------------------------------------------------------------------
def of_stack(n: int, weight: Any, a: Tensor, b: Tensor, plan: Any, bias: Tensor | None, p: float) -> Layer:
    """A layer with the adapters of a stack, each a [r, K] and b [N, r]."""
    adapters, starts, ranks, scaling, most = plan
    parts = [slice(i, i + r) for i, r in zip(starts.tolist(), ranks.tolist(), strict=True)]
    bs = [b[part].t().contiguous() for part in parts]
    return Layer(weight, n, [a[part] for part in parts], bs, adapters, ranks, scaling, most, bias, p)


def apart(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The operator's forward by `forward_layers`."""
    weight, (n, a, b), plan = args[:8], args[8:11], args[11:16]
    layer = of_stack(n, weight, a, b, plan, *args[16:18])
    (y,), (s,) = forward_layers(x, [pack_layer(x, layer)], [args[18]])
    return y, s


def apart_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """And its backward; what is nobody's is zero, and another call for one gradient at a time has the same bits."""
    weight, (a, b, s), plan = args[:8], args[8:11], args[11:16]
    layer = of_stack(dy.shape[1], weight, a, b, plan, None, args[16])
    count, factors = len(layer.a), [(*layer.a, *layer.b)]
    packed = [pack_layer(x.new_empty((1, x.shape[1])), layer)]  # x is another in each call
    rest = (packed, factors, [s], [args[17]])
    dx, (grads,) = backward_layers([dy], x, *rest, True, [[True] * 2 * count])
    none, (only_a,) = backward_layers([dy], x, *rest, False, [[True] * count + [False] * count])
    _, (only_b,) = backward_layers([dy], x, *rest, True, [[False] * count + [True] * count])
    assert none is None
    assert dx is not None
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for i, (start, r) in enumerate(zip(plan[1].tolist(), plan[2].tolist(), strict=True)):
        da[start : start + r], db[start : start + r] = grads[i], grads[count + i].t()
        assert_same_bits(only_a[i], grads[i])
        assert_same_bits(only_b[count + i], grads[count + i])
        assert only_a[count + i] is only_b[i] is None
    return dx, da, db


@needs_native
@pytest.mark.parametrize(("m", "dtype"), grid([1, 33, 130], FLOATS), ids=str)
def test_adapters_apart(level: str, m: int, dtype: torch.dtype) -> None:
    for n, k, ab, p in ((64, 64, F32, 0.0), (50, 77, BF16, 0.25), (70, 192, F16, 0.1)):
        c = make_multi(m, n, k, (3, 16, 0, 37), dtype=dtype, quant="nf4" if k == 64 else "dense", w_dtype=dtype, ab=ab,
                       bias=True, p=p, nested=True)  # fmt: skip
        check_multi(c, apart, apart_backward)
        runs = []
        for count in (1, 2):
            with threads(count):
                y, s = c.forward(apart)
                runs.append((y, s, *c.backward(apart_backward, s)))
        for one, two in zip(*runs, strict=True):
            assert_same_bits(one, two)


# ---- a stack of projections, some of many adapters: what the library can, ahead of an operator for it ----------------
@needs_native
@pytest.mark.parametrize("m", [2, 30])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_projections_with_a_stack_each(level: str, m: int, p: float) -> None:
    first, second = (make_multi(m, n, 64, ranks, p=p, seed=i, bias=True)
                     for i, (n, ranks) in enumerate(((50, [3, 5] * 5), (20, [2, 0, 9]))))  # fmt: skip
    plain = make(m, 30, 64, r=4, p=p, seed=5)
    x = plain.x
    cases = [MultiCase(replace(c.base, x=x), c.stack, c.adapters) for c in (first, second)]
    want = [c.forward(op.forward_op.op) for c in cases]
    y_plain, s_plain = plain.forward(single.forward_op.op)

    def packed(c: MultiCase, **out: Tensor) -> bytes:
        b = c.base
        return pack(2, x, *b.weight, b.n, c.stack.a, c.stack.b, 1.0, b.bias, p, b.seed, plan=c.plan, **out)

    def packed_plain(**out: Tensor) -> bytes:
        return pack(2, x, *plain.weight, plain.n, plain.a, plain.b, plain.scaling, None, p, plain.seed, **out)

    outs = [(torch.empty_like(y), torch.empty_like(s)) for y, s in (want[0], (y_plain, s_plain), want[1])]
    parts = [packed(cases[0], y=outs[0][0], s=outs[0][1]), packed_plain(y=outs[1][0], s=outs[1][1]),
             packed(cases[1], y=outs[2][0], s=outs[2][1])]  # fmt: skip
    native.check(native.cpu().pk_cpu_lora_linear(b"".join(parts), 3))
    for got, expected in zip(outs, (want[0], (y_plain, s_plain), want[1]), strict=True):
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])

    dx = torch.empty_like(x)
    grads = [c.backward(op.backward_op.op, s) for c, (_, s) in zip(cases, want, strict=True)]
    plain_grads = plain.backward(single.backward_op.op, s_plain)
    found = [[torch.zeros_like(t) for t in g[1:]] for g in (grads[0], plain_grads, grads[1])]
    parts = [packed(c, s=s, dy=c.base.dy, dx=dx, da=da, db=db)
             for c, (_, s), (da, db) in zip(cases, want, found[::2], strict=True)]  # fmt: skip
    parts.insert(1, packed_plain(s=s_plain, dy=plain.dy, dx=dx, da=found[1][0], db=found[1][1]))
    native.check(native.cpu().pk_cpu_lora_linear_backward(b"".join(parts), 3))
    for got, expected in zip(found, (grads[0], plain_grads, grads[1]), strict=True):
        assert_same_bits(got[0], expected[1])
        assert_same_bits(got[1], expected[2])
    exact, sizes = [], []
    for c, (_, s) in zip(cases, want, strict=True):
        exact.append(c.double().backward(op.backward_op.reference, s.double())[0])
        sizes.append(c.magnitudes().backward(op.backward_op.reference, s.double().abs())[0])
    exact.append(plain.double().backward(single.backward_op.reference, s_plain.double())[0])
    sizes.append(plain.dy.double().abs() @ single.dense_weight(*plain.weight, 30, 64, torch.float64).abs())
    assert_no_worse(dx, grads[0][0] + plain_grads[0] + grads[1][0], sum(exact), sum(sizes))


# ---- what it does not serve, and what the library objects to ---------------------------------------------------------
@needs_native
def test_float64_is_refused_with_its_name() -> None:
    c = make_multi(3, 8, 64, [2], ab=torch.float64)
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"does not serve a in torch\.float64"):
        c.forward(op.forward_op.op)
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"float64"):
        c.double().forward(op.forward_op.op)


@needs_native
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"starts": torch.tensor([-1, 4])}, "adapter 0 has rank 2 .max_rank 3. from row -1 of 8"),
        ({"starts": torch.tensor([7, 4])}, "adapter 0 has rank 2 .max_rank 3. from row 7 of 8"),
        ({"ranks": torch.tensor([4, 3])}, "adapter 0 has rank 4 .max_rank 3. from row"),
        ({"ranks": torch.tensor([-1, 3])}, "adapter 0 has rank -1"),
    ],
)
def test_the_library_looks_at_values(change: dict[str, Tensor], text: str) -> None:
    stack = replace(make_stack(6, 16, [2, 3]), **change)
    c = MultiCase(make(2, 6, 16, quant="dense"), stack, torch.tensor([0, 1]))
    b = c.base
    y, s = torch.empty(2, 6), torch.empty(2, 3)
    call = pack(1, b.x, *b.weight, b.n, stack.a, stack.b, 1.0, None, 0.0, None, y=y, s=s, plan=c.plan)
    with pytest.raises(native.NativeError, match=text):
        native.check(native.cpu().pk_cpu_lora_linear(call, 1))
    with use_backend("native"), pytest.raises(ValueError, match="multi_lora_linear: "):
        multi_lora_linear(b.x, b.weight[0], stack, c.adapters)
