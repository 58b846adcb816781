"""Makers of calls of lora_linear, and the levels of its native backend, for several test files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from peft_kernels import native, use_backend
from peft_kernels.ops import lora_linear as op
from peft_kernels.ops import lora_linear_stacked as stacked
from peft_kernels.testing import assert_no_worse, random_quant_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLOATS = (F32, BF16, F16)
LEVELS = [] if native.available() else list(native.levels())
needs_native = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """The native backend forced, at one instruction set level; "reference" is the reference."""
    if level == "reference":
        with use_backend("reference"):
            yield
        return
    before = native.level()
    native.set_level(level)
    try:
        with use_backend("native"):
            yield
    finally:
        native.set_level(before)


def level_fixture(*more: str) -> Callable[..., Iterator[str]]:
    """A fixture: the test at each level, and on what more `at_level` takes."""

    @pytest.fixture(name="level", params=[*LEVELS, *more])
    def level(request: pytest.FixtureRequest) -> Iterator[str]:
        with at_level(request.param):
            yield request.param

    return level


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def saved_bytes(run: Callable[[], object], own: Iterable[object]) -> int:
    """Bytes of the storages that `run` keeps for its backward, each once, besides those of the tensors in `own`."""
    known = {t.untyped_storage().data_ptr() for t in own if isinstance(t, Tensor)}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage takes the address of one that was freed

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(saved.values())


@dataclass
class Case:
    """One call of the op: x, dy and the operator's arguments from `weight` to `seed`."""

    x: Tensor
    dy: Tensor
    weight: tuple
    n: int
    a: Tensor | None
    b: Tensor | None
    bias: Tensor | None
    scaling: float
    p: float
    seed: Tensor | None

    def forward(self, fn) -> tuple[Tensor, Tensor]:
        return fn(self.x, *self.weight, self.n, self.a, self.b, self.scaling, self.bias, self.p, self.seed)

    def backward(self, fn, s: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return fn(self.dy, self.x, *self.weight, self.a, self.b, s, self.scaling, self.p, self.seed, True,
                  self.a is not None)  # fmt: skip

    def double(self) -> Case:
        def up(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double()

        dense = self.weight[5] == 0
        weight = (self.weight[0].double() if dense else self.weight[0], *self.weight[1:])
        return Case(up(self.x), up(self.dy), weight, self.n, up(self.a), up(self.b), up(self.bias), self.scaling,
                    self.p, self.seed)  # fmt: skip

    def to(self, device: str) -> Case:
        def move(v):
            return tuple(map(move, v)) if isinstance(v, tuple) else v.to(device) if isinstance(v, Tensor) else v

        return Case(*(move(getattr(self, f.name)) for f in fields(self)))


def on_tensor_cores(x: Tensor, *sizes: int) -> int:
    """The terms of a float32 output that is a sum over `sizes`, one of sums if there are two: none of float32 x, whose
    products are on no tensor core."""
    return 0 if x.dtype is F32 else sum(sizes)


def check(c: Case) -> None:
    """Forward and backward of the forced backend are no worse than eager code in the same dtype."""
    exact, w = c.double(), op.dense_weight(*c.double().weight, c.n, c.x.shape[1], torch.float64)
    y, s = c.forward(op.forward_op.op)
    y_eager, s_eager = c.forward(op.forward_op.reference)
    y_exact, s_exact = exact.forward(op.forward_op.reference)
    size = exact.x.abs() @ w.abs().t()
    dx_size = exact.dy.abs() @ w.abs()
    if c.a is not None:
        s_size = exact.x.abs() @ exact.a.abs().t() / (1 - c.p)
        assert_no_worse(s, s_eager, s_exact, s_size, on_tensor_cores(c.x, c.x.shape[1]))
        size = size + c.scaling * (s_size @ exact.b.abs().t())
        ds_size = c.scaling * (exact.dy.abs() @ exact.b.abs())
        dx_size = dx_size + ds_size @ exact.a.abs() / (1 - c.p)
    if c.bias is not None:
        size = size + exact.bias.abs()
    assert_no_worse(y, y_eager, y_exact, size)

    adapter = c.a is not None
    dx, da, db = c.backward(op.backward_op.op, s if adapter else None)
    dx_eager, da_eager, db_eager = c.backward(op.backward_op.reference, s_eager if adapter else None)
    dx_exact, da_exact, db_exact = exact.backward(op.backward_op.reference, s_exact if adapter else None)
    assert_no_worse(dx, dx_eager, dx_exact, dx_size)
    if adapter:
        da_terms, db_terms = on_tensor_cores(c.x, *c.dy.shape), on_tensor_cores(c.x, *c.x.shape)
        assert_no_worse(da, da_eager, da_exact, ds_size.t() @ exact.x.abs() / (1 - c.p), da_terms)
        assert_no_worse(db, db_eager, db_exact, c.scaling * (exact.dy.abs().t() @ s_size), db_terms)


def make(
    m: int, n: int, k: int, *, dtype: torch.dtype = F32, quant: str = "nf4", blocksize: int = 64, nested: bool = False,
    w_dtype: torch.dtype = F32, r: int = 0, ab: torch.dtype = F32, p: float = 0.0, bias: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if quant == "dense":
        weight = ((normal(n, k) * 0.1).to(w_dtype), None, None, None, None, 0, 64, 256)
    else:
        weight = random_quant_weight(n, k, quant_type=quant, blocksize=blocksize, nested=nested, seed=seed).flatten()
    return Case(
        normal(m, k).to(dtype),
        normal(m, n).to(dtype),
        weight,
        n,
        normal(r, k).to(ab) if r else None,
        (normal(n, r) * 0.1).to(ab) if r else None,
        normal(n).to(dtype) if bias else None,
        0.7,
        p,
        torch.tensor([0x1234_5678_9ABC_DEF + seed]) if p else None,
    )


class Stack:
    """Calls of lora_linear that share x, as one of lora_linear_stacked."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = list(cases)
        for c in cases:
            c.x = cases[0].x

    def forward(self, fn) -> list[Tensor]:
        rows = [(*c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed) for c in self.cases]
        return fn(self.cases[0].x, *map(list, zip(*rows, strict=True)))

    def backward(self, fn, ss: Sequence[Tensor], need_dx: bool = True, need_ab: bool = True) -> list[Tensor]:
        rows = [(c.dy, *c.weight, c.a, c.b, s if c.a is not None else None, c.scaling, c.p, c.seed)
                for c, s in zip(self.cases, ss, strict=True)]  # fmt: skip
        return fn(self.cases[0].x, *map(list, zip(*rows, strict=True)), need_dx,
                  [need_ab and c.a is not None for c in self.cases])  # fmt: skip

    def double(self) -> Stack:
        return Stack([c.double() for c in self.cases])


def check_stack(stack: Stack) -> None:
    """The forced backend is no worse than eager code in the same dtype: outputs, and the gradients that are sums."""
    cases, exact = stack.cases, stack.double()
    count = len(cases)
    got, eager = stack.forward(stacked.forward_op.op), stack.forward(stacked.forward_op.reference)
    want = exact.forward(stacked.forward_op.reference)
    grads = stack.backward(stacked.backward_op.op, got[count:])
    grads_eager = stack.backward(stacked.backward_op.reference, eager[count:])
    grads_want = exact.backward(stacked.backward_op.reference, want[count:])
    dx_size = torch.zeros_like(grads_want[0])
    for i, (c, e) in enumerate(zip(cases, exact.cases, strict=True)):
        w = op.dense_weight(*e.weight, c.n, c.x.shape[1], torch.float64)
        y_size = e.x.abs() @ w.abs().t()
        dx_size = dx_size + e.dy.abs() @ w.abs()
        if c.bias is not None:
            y_size = y_size + e.bias.abs()
        if c.a is not None:
            s_size = e.x.abs() @ e.a.abs().t() / (1 - c.p)
            ds_size = c.scaling * (e.dy.abs() @ e.b.abs())
            y_size = y_size + c.scaling * (s_size @ e.b.abs().t())
            dx_size = dx_size + ds_size @ e.a.abs() / (1 - c.p)
            j, k = count + i, 1 + count + i
            assert_no_worse(got[j], eager[j], want[j], s_size, on_tensor_cores(c.x, c.x.shape[1]))
            assert_no_worse(grads[1 + i], grads_eager[1 + i], grads_want[1 + i], ds_size.t() @ e.x.abs() / (1 - c.p),
                            on_tensor_cores(c.x, *c.dy.shape))  # fmt: skip
            assert_no_worse(grads[k], grads_eager[k], grads_want[k], c.scaling * (e.dy.abs().t() @ s_size),
                            on_tensor_cores(c.x, *c.x.shape))  # fmt: skip
        assert_no_worse(got[i], eager[i], want[i], y_size)
    assert_no_worse(grads[0], grads_eager[0], grads_want[0], dx_size)
