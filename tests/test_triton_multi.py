"""multi_lora_linear on Triton against float64: in Triton's interpreter, and on a GPU.

As test_triton_stacked.py: `test_in_the_interpreter` starts a process on this same file, in which Triton interprets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from forms import matrix
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter, small_tiles
from lora_tools import BF16, F16, F32
from multi_tools import MultiCase, check_multi, make_multi

from peft_kernels import tuning, use_backend
from peft_kernels.ops import lora_linear as single
from peft_kernels.ops import multi_lora_linear as op
from peft_kernels.ops.multi_lora_linear import triton as backend
from peft_kernels.testing import assert_no_worse, assert_same_bits

pytest.importorskip("triton", reason="Triton is not installed")


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@pytest.fixture
def small() -> Iterator[None]:
    with small_tiles(), use_backend("triton"):
        yield


FORMS = {"by row": (64, 64), "by group": (0, 0), "either": (0, 64)}


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the terms of the adapters reach a tile: a name in FORMS, as an indirect parameter."""
    few, most = FORMS[request.param]
    monkeypatch.setattr(backend, "_FEW_ROWS", few)
    monkeypatch.setattr(backend, "_MOST_ROWS", most)


CASES = {
    # rows of x, out and in features, ranks (0: a free slot), what else
    "mixed ranks": lambda t: make_multi(37, 40, 96, [3, 0, 20, 16, 7], dtype=t, blocksize=32, nested=True, bias=True),
    "one row each": lambda t: make_multi(18, 17, 64, [2] * 18, adapters=[*range(17, -1, -1)], dtype=t, max_rank=5,
                                         ab=F16),
    "one adapter": lambda t: make_multi(21, 24, 64, [4, 17, 1], adapters=[1] * 21, dtype=t, nested=True, p=0.25,
                                        ab=F16),
    "the base alone": lambda t: make_multi(5, 24, 64, [4, 2], adapters=[-1] * 5, dtype=t, bias=True),
    "any layout": lambda t: make_multi(19, 31, 77, [1, 5, 2], dtype=t, quant="fp4", p=0.3, ab=BF16),
    "dense": lambda t: make_multi(34, 29, 50, [40, 3], dtype=t, quant="dense", w_dtype=t, ab=t, p=0.5),
}  # fmt: skip


@on_device
@pytest.mark.parametrize(("name", "dtype", "form"), matrix(
    [
        ("mixed ranks", F32, "by group"), ("mixed ranks", F16, "by row"), ("one row each", F32, "by row"),
        ("one row each", F16, "either"), ("one adapter", F16, "either"), ("one adapter", F16, "by group"),
        ("the base alone", F16, "by group"), ("any layout", F32, "by row"), ("any layout", F16, "by group"),
        ("dense", F32, "by group"), ("dense", F16, "either"), ("dense", BF16, "by group"),
    ],
    short=[("mixed ranks", F32, "by group"), ("one row each", F16, "either"), ("one adapter", F16, "by group"),
           ("the base alone", F16, "by group"), ("any layout", F32, "by row"), ("dense", BF16, "by group")],
), indirect=["form"])  # fmt: skip
def test_device_cases(small: None, form: None, name: str, dtype: torch.dtype) -> None:
    check_multi(CASES[name](dtype).to(DEVICE))


@on_device
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_device_two_runs_give_the_same_bits(small: None, form: None) -> None:
    c = make_multi(20, 32, 64, [4, 6], dtype=F16, p=0.2, nested=True).to(DEVICE)
    runs = [c.forward(op.forward_op.op) for _ in range(2)]
    grads = [c.backward(op.backward_op.op, runs[0][1]) for _ in range(2)]
    for first, again in zip((*runs[0], *grads[0]), (*runs[1], *grads[1]), strict=True):
        assert_same_bits(first, again)


@on_device
def test_device_one_adapter_has_the_projections_of_lora_linear(small: None) -> None:
    """The same s, which is a sum over K alone; what is sorted into the tile beside a row does not change it.

    x and A are multiples of 1/4 and p is 1/5, so that sums are exact in any order: the interpreter multiplies with
    numpy, whose order depends on a tile's shape on some processors.
    """
    c = make_multi(20, 32, 96, [4, 6, 4], dtype=F16, p=0.2).to(DEVICE)
    for t in (c.base.x, c.stack.a):
        t.mul_(4).round_().div_(4)
    s = c.forward(op.forward_op.op)[1]
    for i in range(3):
        own = slice(int(c.stack.starts[i]), int(c.stack.starts[i] + c.stack.ranks[i]))
        a, b = c.stack.a[own], c.stack.b[own].t()
        alone = replace(c.base, a=a, b=b).forward(single.forward_op.op)[1]
        rows = c.adapters == i
        assert rows.any()
        assert_same_bits(s[rows, : a.shape[0]].contiguous(), alone[rows])


@on_device
def test_device_many_rows_take_the_vendors_matmul_and_are_sorted(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    c = make_multi(37, 48, 64, [4, 0, 18], dtype=F16, nested=True, p=0.1).to(DEVICE)
    plan = backend._Plan(*c.plan, c.stack.a)
    monkeypatch.setattr(backend, "_MOST_COUNTED", 36)
    again = backend._Plan(*c.plan, c.stack.a)
    for a, b in ((plan.order, again.order), (plan.bounds, again.bounds)):
        assert_same_bits(a, b)
    with tuning.override("panels", from_M=16, from_M_dense=16):
        check_multi(c)


@on_device
def test_device_what_is_not_there_is_the_base(small: None) -> None:
    """A GPU cannot refuse it without waiting: indices beyond the stack, ranks beyond max_rank, rows beyond a and b."""
    c = make_multi(9, 16, 64, [2, 3, 2, 2], adapters=[0, 1, 2, 3, 0, 1, 2, 3, 0], quant="dense").to(DEVICE)
    stack = replace(c.stack, max_rank=2, starts=c.stack.starts.clone())  # the second has rank 3
    stack.starts[2], stack.starts[3] = stack.a.shape[0] - 1, -1
    rows = c.adapters.clone()
    rows[4], rows[8] = 4, -7
    found = MultiCase(c.base, stack, rows)
    want = MultiCase(c.base, replace(c.stack, max_rank=2), torch.full_like(rows, -1))
    want.adapters[0] = 0
    got, base = (v.forward(op.forward_op.op) for v in (found, want))
    for a, b in zip((*got, *found.backward(op.backward_op.op, got[1])),
                    (*base, *want.backward(op.backward_op.op, base[1])), strict=True):  # fmt: skip
        assert_same_bits(a, b)


@on_device
@pytest.mark.parametrize(
    ("value", "form"),
    [(float("inf"), "by group"), (float("nan"), "either"), (float("nan"), "by row")],
    indirect=["form"],
)
def test_device_weights_that_are_not_finite_reach_no_other_adapter(small: None, form: None, value: float) -> None:
    c = make_multi(12, 32, 64, [3, 20, 3], adapters=[0, 1, -1, 2] * 3, quant="dense", dtype=F16).to(DEVICE)
    y, s = c.forward(op.forward_op.op)
    grads = c.backward(op.backward_op.op, s)
    own = slice(int(c.stack.starts[1]), int(c.stack.starts[1] + 20))
    c.stack.a[own.start + 3, 5], c.stack.b[own.start + 4, 7] = value, value
    got, s_got = c.forward(op.forward_op.op)
    new = c.backward(op.backward_op.op, s_got)
    others = c.adapters != 1
    for a, b in ((got, y), (s_got, s), (new[0], grads[0])):
        assert_same_bits(a[others], b[others])
    assert not got[~others].isfinite().all()
    assert not new[0][~others].isfinite().all()
    mine = torch.zeros(c.stack.a.shape[0], dtype=torch.bool, device=DEVICE)
    mine[own] = True
    for a, b in zip(new[1:], grads[1:], strict=True):
        assert_same_bits(a[~mine], b[~mine])


@on_device
def test_device_shapes_without_rows_or_adapters(small: None) -> None:
    for m, ranks, most in ((0, [2], None), (3, [], None), (3, [0, 0], None), (3, [0], 2), (3, [2], None)):
        check_multi(make_multi(m, 8, 32, ranks, max_rank=most, nested=True, bias=True, blocksize=32).to(DEVICE))


@on_device
def test_device_only_what_is_needed(small: None) -> None:
    c = make_multi(11, 16, 64, [4, 2], dtype=F16, p=0.1).to(DEVICE)
    s = c.forward(op.forward_op.op)[1]
    da, db = c.backward(op.backward_op.op, s)[1:]
    only_dx, none_a, none_b = c.backward(op.backward_op.op, s, need_ab=False)
    none_x, only_da, only_db = c.backward(op.backward_op.op, s, need_dx=False)
    assert (none_a.numel(), none_b.numel(), none_x.numel()) == (0, 0, 0)
    assert_same_bits(only_da, da)
    assert_same_bits(only_db, db)
    exact = c.double().backward(op.backward_op.reference, s.double(), need_ab=False)[0]
    size = c.magnitudes().backward(op.backward_op.reference, s.double(), need_ab=False)[0]
    assert_no_worse(only_dx, c.backward(op.backward_op.reference, s, need_ab=False)[0], exact, size)
