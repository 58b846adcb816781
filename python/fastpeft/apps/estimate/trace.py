"""A step without memory: which tensors live when, and the products of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .flops import counters

_LEAST_OFFLOADED = 1 << 16  # as `offload_activations` moves
# Answers to what asks for a value: positions are those of one example, masks are ranges, numbers are 0.
_ANSWERS: dict[Any, Any] = {torch.ops.aten.equal.default: True, torch.ops.aten._local_scalar_dense.default: 0}


@dataclass(frozen=True)
class Trace:
    """Bytes beside the model: kept when the loss is there, and at most; FLOPs of forward and backward."""

    kept: int
    peak: int
    flops: int


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's has no types
    """Inside, the bytes of the tensors that live, without those that there were before.

    square: masks of that many positions by themselves are left out, as `accelerate` makes none.
    """

    def __init__(self, there: Iterable[Tensor], square: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._square, self._counters = square, counters()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            # a CPU multiplies others, too, but torch's rule for shapes refuses them
            found = func(*(t.to(torch.bfloat16) for t in args[:2]), *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            found = func(*args, **(kwargs or {}))
        count = self._counters.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=found))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._add(leaf)
        return found

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        if self._square and tensor.dtype is torch.bool and tensor.shape[-2:] == (self._square, self._square):
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, size)

    def _leave(self, size: int) -> None:
        self.now -= size


def step(model: Any, loss: Callable[[], Tensor], square: int, offload: bool) -> Trace:
    """Trace a forward and a backward pass. loss: computes the loss with `model`."""
    own = [*model.parameters(), *model.buffers()]
    with Live(own, square) as live:
        with _elsewhere(own) if offload else nullcontext():
            result = loss()
        kept = live.now
        result.backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None
    return Trace(kept, live.peak, live.flops)


def _elsewhere(own: list[Tensor]) -> AbstractContextManager[Any]:
    """Hooks that keep no more than the shape of what `offload_activations` moves."""
    weights = {t.untyped_storage() for t in own}

    def pack(tensor: Tensor) -> Any:
        stays = tensor.nbytes < _LEAST_OFFLOADED or tensor.untyped_storage() in weights
        return tensor if stays else (tensor.shape, tensor.dtype)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
