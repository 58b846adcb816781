"""lora_shrink and lora_expand: each backend against float64, launches of a layer counted.

As test_triton_multi.py: `test_in_the_interpreter` starts a process on this same file, in which Triton interprets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from fastpeft.apps.vllm_plugin import LoraOps
from forms import matrix
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter, small_tiles
from lora_tools import BF16, F16, F32, needs_native
from torch import Tensor

from peft_kernels import RowGroups, lora_expand, lora_shrink, use_backend
from peft_kernels.ops import lora_shrink as op
from peft_kernels.testing import assert_no_worse, assert_same_bits


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    run_in_the_interpreter(__file__, "device")


@dataclass
class Update:
    """An update of y [M, N] in columns `offsets` of slices, by adapters [M] of `b[0].shape[0]` slots."""

    x: Tensor
    y: Tensor
    a: list[Tensor]
    b: list[Tensor]
    adapters: Tensor
    offsets: list[int]
    scale: float
    add: bool
    spare: int = 0  # rows of the batch beyond those of x

    def to(self, f: Callable[[Tensor], Tensor]) -> Update:
        return Update(f(self.x), f(self.y), [f(t) for t in self.a], [f(t) for t in self.b], self.adapters,
                      self.offsets, self.scale, self.add, self.spare)  # fmt: skip

    def on(self, device: str) -> Update:
        moved = self.to(lambda t: t.to(device))
        moved.adapters = self.adapters.to(device)
        return moved

    def groups(self) -> RowGroups:
        return RowGroups(torch.cat([self.adapters, self.adapters.new_full((self.spare,), -1)]), self.b[0].shape[0])


def make(
    adapters: list[int], k: int, widths: list[int], r: int, dtype: torch.dtype, *, slots: int = 4, scale: float = 1.0,
    add: bool = True, first: int = 0, ab: torch.dtype | None = None, spare: int = 0,
) -> Update:  # fmt: skip
    g = torch.Generator().manual_seed(len(adapters) * k + r)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    ab = ab or dtype
    offsets = [first + sum(widths[:i]) for i in range(len(widths))]
    m = len(adapters)
    return Update(draw(m, k), draw(m, offsets[-1] + widths[-1]), [draw(slots, r, k, dtype=ab) for _ in widths],
                  [draw(slots, n, r, dtype=ab) for n in widths], torch.tensor(adapters, dtype=torch.int64), offsets,
                  scale, add, spare)  # fmt: skip


def low(u: Update) -> Tensor:
    """Row by row: [slices, M, r]."""
    acc = torch.promote_types(u.x.dtype, F32)
    none = torch.zeros(u.a[0].shape[1], dtype=acc, device=u.x.device)
    return torch.stack([torch.stack([
        u.scale * (t[j].to(acc) @ u.x[m].to(acc)) if j >= 0 else none for m, j in enumerate(u.adapters.tolist())
    ]) for t in u.a])  # fmt: skip


def added(u: Update, s: Tensor) -> Tensor:
    y = u.y.clone()
    for part, t, offset in zip(s, u.b, u.offsets, strict=True):
        for m, j in enumerate(u.adapters.tolist()):
            if j >= 0:
                own = y[m, offset : offset + t.shape[1]]
                own.copy_(own.to(s.dtype) * u.add + t[j].to(s.dtype) @ part[m])
    return y


def check(u: Update, parts: int | None = None) -> None:
    groups, exact, size = u.groups(), u.to(Tensor.double), u.to(lambda t: t.double().abs())
    size.scale = abs(u.scale)
    if parts is None:
        s = lora_shrink(u.x, u.a, groups, u.scale)
    else:
        s = op.shrink_op.op(u.x, u.a, *groups.rows(len(u.x)), u.scale, parts)
        assert s.shape[1] == parts
    assert_no_worse(s.sum(1), low(u), low(exact), low(size))
    y = u.y.clone()
    lora_expand(y, [*s], u.b, groups, u.offsets, u.add)
    assert_no_worse(y, added(u, low(u)), added(exact, low(exact)), added(size, low(size)))
    kept = torch.ones_like(y, dtype=torch.bool)
    for t, offset in zip(u.b, u.offsets, strict=True):
        kept[u.adapters >= 0, offset : offset + t.shape[1]] = False
    assert_same_bits(y[kept], u.y[kept])
    again = u.y.clone()
    lora_expand(again, [*s], u.b, groups, u.offsets, u.add)
    assert_same_bits(again, y)


CASES: dict[str, Callable[[torch.dtype], tuple[Update, int | None]]] = {
    "decoding": lambda t: (make([2, -1, 0, 0, 3, -1, 2], 300, [40, 16, 24], 8, t, scale=0.5, spare=9), 3),
    "one row": lambda t: (make([1], 257, [19], 16, t, ab=BF16), 2),
    "one adapter": lambda t: (make([3] * 37, 64, [70, 8], 40, t, spare=3), None),
    "many adapters": lambda t: (make([*range(18)] + [-1] * 3, 96, [33], 5, t, slots=20, add=False, first=7), None),
    "five slices": lambda t: (make([0, -1, 1], 32, [8, 16, 8, 24, 3], 3, t, ab=F32), None),
    "none": lambda t: (make([-1] * 5, 64, [16], 4, t, scale=2.0), None),
}  # fmt: skip


@on_device
@pytest.mark.parametrize(("name", "dtype"), matrix(
    [(name, dtype) for name in CASES for dtype in (F32, BF16, F16)],
    short=[("decoding", BF16), ("one row", F32), ("one adapter", F16), ("many adapters", BF16), ("five slices", F16),
           ("none", BF16)],
))  # fmt: skip
def test_device_cases(name: str, dtype: torch.dtype) -> None:
    update, parts = CASES[name](dtype)
    with small_tiles(), use_backend("triton"):
        check(update.on(DEVICE), parts)


@on_device
def test_device_what_no_adapter_reads_is_not_read() -> None:
    """A slot without rows may hold NaN; a scale that is not finite leaves rows without an adapter zero."""
    u = make([2, -1, 0], 64, [16, 8], 4, BF16, scale=float("inf")).on(DEVICE)
    for t in (*u.a, *u.b):
        t[[1, 3]] = float("nan")
    with use_backend("triton"):
        s = lora_shrink(u.x, u.a, u.groups(), u.scale)
        assert not s[:, :, 1].any()
        y = u.y.clone()
        lora_expand(y, [*lora_shrink(u.x, u.a, u.groups())], u.b, u.groups(), u.offsets)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu(name: str, dtype: torch.dtype, backend: str) -> None:
    update, parts = CASES[name](dtype)
    with use_backend(backend):
        check(update, parts)


def test_rows_are_put_in_order_in_place() -> None:
    groups = RowGroups(torch.tensor([2, -1, 0, 7, 2, 0]), 3)
    order, bounds = groups.order, groups.bounds
    assert order.tolist() == [2, 5, 0, 4, 1, 3]  # what is no slot stands with the rest
    assert bounds.tolist() == [0, 2, 2, 4, 6]
    groups.adapters.fill_(-1)
    groups.adapters[1] = 1
    groups.refresh()
    assert groups.order is order
    assert groups.bounds is bounds
    assert order.tolist() == [1, 0, 2, 3, 4, 5]
    assert bounds.tolist() == [0, 0, 1, 1, 6]


# ---- launches -------------------------------------------------------------------------------------------------------
FREE = {"empty", "view", "slice", "select", "reshape", "as_strided", "unbind", "contiguous", "squeeze", "detach",
        "resolve_conj", "resolve_neg", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "alias", "split",
        "unsqueeze"}  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[str]]:
    """Launches of a call on a GPU: Triton's kernels, which are not run here, and torch's."""
    from peft_kernels.triton_lib import host

    launched: list[str] = []
    monkeypatch.setattr(host, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))

    def count(call: Callable[[], Any]) -> list[str]:
        launched.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, use_backend("triton"):
            call()
        names = [e.name.removeprefix("aten::") for e in seen.events() if e.name.startswith("aten::")]
        # conftest.py fills what is empty
        own = [name for before, name in pairwise(["", *names]) if not (name == "fill_" and before.startswith("empty"))]
        return [*launched, *(name for name in own if name not in FREE)]

    return count


@on_device
def test_device_a_layer_takes_two_launches(counted: Callable[[Callable[[], Any]], list[str]]) -> None:
    """By themselves, and as vLLM's layers call for q, k and v."""
    u = make([2, -1, 0, 0], 256, [64, 32, 32], 8, BF16).on(DEVICE)
    groups, y = u.groups(), u.y.clone()
    wrapper: Any = object.__new__(LoraOps)
    wrapper._token_lora_indices = groups.adapters
    stacks = [tuple(t.unsqueeze(1) for t in ts) for ts in (u.a, u.b)]
    wrapper._of_tokens(stacks[0])  # once a step, by update_metadata

    def update() -> None:
        lora_expand(y, [*lora_shrink(u.x, u.a, groups)], u.b, groups, u.offsets)

    def layer() -> None:
        wrapper.add_lora_linear(y, u.x, *stacks, 1.0, (64, 32, 32))

    for call in (update, layer):
        assert counted(call) == ["shrink_kernel", "expand_kernel"]
    assert "add_" in counted(lambda: y.add_(1))  # torch's own are seen
