"""Logits that are made when they are asked for: a tensor that keeps the head's input in place of its output.

A model's own code goes on with it as with any logits. What scales or casts them is noted down, what takes rows takes
rows of the input, and `cross_entropy` is computed by chunks, as `argmax` over the vocabulary is. Everything else gets
the real tensor, made at that moment and kept, with its graph; so no code has to know of it, and none can get other
numbers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.lazy_tensor import LazyTensor, plain
from . import chunked_loss
from .chunked_loss import chunked_cross_entropy, cross_entropy_by_rows

_SCALING = {"mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "__div__", "tanh"}
_CASTING = {"to", "float", "double", "half", "bfloat16"}
_Step = tuple[str, Callable[[Tensor], Tensor], float]  # its name, itself, the number that it multiplies by


@dataclass
class Watch:
    """How the loss of a model was computed. chunked: times by chunks; whole: reason -> times with all logits at once.
    inside: threads in which the model's forward is running, of which alone is counted.
    """

    chunked: int = 0
    whole: Counter[str] = field(default_factory=Counter)
    inside: set[int] = field(default_factory=set)

    def all_at_once(self, why: str) -> None:
        if threading.get_ident() in self.inside:
            self.whole[why] += 1


@dataclass(frozen=True)
class _Head:
    """A head, and the state it is in when it is first called: logits are of that state or of none.

    matrix: the head is one dense matrix, whose slices can be read. call: how it is called.
    """

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    matrix: bool
    grad: bool
    autocast: torch.dtype | None
    watch: Watch
    seen: list[Any]

    def run(self, hidden: Tensor, steps: Iterable[_Step]) -> Tensor:
        """Logits of these rows, as the model makes them, with gradients where they are enabled."""
        device, dtype = hidden.device.type, self.autocast
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            logits = self.call(hidden) if hidden.dim() > 1 else self.call(hidden.unsqueeze(0))[0]
            for _, step, _ in steps:
                logits = step(logits)
        return logits

    def check(self) -> None:
        if self.seen != state_of(self.module):
            raise RuntimeError(
                "The logits of a model whose loss is computed by chunks were asked for after its head had changed (a "
                "step of an optimizer, other adapters, train or eval). Read them before, or call "
                "`fastpeft.unaccelerate`."
            )


def state_of(module: nn.Module) -> list[Any]:
    """All that a head's output depends on: its tensors, by object and version, and how its adapters are set."""
    found: list[Any] = []
    for m in module.modules():
        found.append((m.training, m.__dict__.get("_disable_adapters"), list(m.__dict__.get("merged_adapters", ()))))
        found.append(str(m.__dict__.get("_active_adapter", m.__dict__.get("_active_adapters"))))
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                found.append((id(t), t.data_ptr(), -1 if t.is_inference() else t._version))
    return found


class LazyLogits(LazyTensor):
    """Logits ``steps(head(hidden))``, [*hidden.shape[:-1], V], that hold ``hidden`` alone until they are needed."""

    _hidden: Tensor
    _head: _Head
    _steps: tuple[_Step, ...]
    _part_of: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None

    @staticmethod
    def __new__(
        cls, hidden: Tensor, head: _Head, width: int, dtype: torch.dtype, steps: tuple[_Step, ...] = (),
        part_of: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None = None,
    ) -> LazyLogits:  # fmt: skip
        grads = head.grad and (hidden.requires_grad or any(p.requires_grad for p in head.module.parameters()))
        self: LazyLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (*hidden.shape[:-1], width), dtype=dtype, device=hidden.device, requires_grad=grads
        )
        self._hidden, self._head, self._steps, self._part_of, self._made = hidden, head, steps, part_of, None
        if grads:
            with plain():
                self.register_hook(_lost)  # type: ignore[no-untyped-call]
        return self

    def _stands(self) -> bool:
        """True if the real tensor is there, or that of which this is a part, which someone may have written to."""
        return self._made is not None or (self._part_of is not None and self._part_of[0]._stands())

    def made(self, why: str, shared: bool = False) -> Tensor:
        """The real tensor. shared: someone writes to it, which whatever this is a part of has to see."""
        if self._made is None:
            self._head.watch.all_at_once(f"the model needs its logits for `{why}`")
            if self._part_of is not None and (shared or self._part_of[0]._stands()):
                whole, take = self._part_of
                with torch.set_grad_enabled(self._head.grad):
                    self._made = take(whole.made(why, shared))
            else:
                self._head.check()
                with torch.set_grad_enabled(self._head.grad):
                    self._made = self._head.run(self._hidden, self._steps)
        return self._made

    def _with(self, hidden: Tensor | None = None, head: _Head | None = None, **more: Any) -> LazyLogits:
        h, found = self._hidden if hidden is None else hidden, self._head if head is None else head
        options = {"dtype": self.dtype, "steps": self._steps, **more}
        return LazyLogits(h, found, self.shape[-1], **options)

    def _lazily(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result where it can be had without all logits; NotImplemented where not."""
        name = getattr(func, "__name__", "")
        if func is F.cross_entropy:
            return self._cross_entropy(*rest, **kwargs)
        if any(isinstance(a, Tensor) for a in (*rest, *kwargs.values())) and name != "__getitem__":
            return NotImplemented
        if name in _CASTING or (name in _SCALING and not kwargs):
            return self._step(name, func, rest, kwargs)
        if name == "detach" and not rest:
            head = replace(self._head, grad=False)
            return self._with(self._hidden.detach(), head, part_of=(self, Tensor.detach))
        if name == "clone" and not rest and not kwargs:
            return self._with(head=replace(self._head, grad=self._head.grad and torch.is_grad_enabled()))
        if name == "contiguous" and not rest and not kwargs:
            return self
        if name == "argmax" and self.dim() > 1 and (kwargs or {"dim": rest[0] if len(rest) == 1 else None}) in (
            {"dim": -1}, {"dim": self.dim() - 1}
        ):  # fmt: skip
            return self._argmax()
        return self._rows(name, func, rest, kwargs)

    def _step(self, name: str, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with plain():
            try:
                like = func(torch.empty(0, dtype=self.dtype, device=self.device), *rest, **kwargs)
            except (TypeError, RuntimeError):  # torch has something to say of it
                return NotImplemented
        if like.device != self.device or not like.is_floating_point() or kwargs.get("copy"):
            return NotImplemented
        if name in _CASTING and like.dtype is self.dtype:
            return self
        number = 1.0
        if name in _SCALING and name != "tanh":
            number = float(rest[0]) if "mul" in name else 1.0 / float(rest[0]) if rest[0] else float("nan")
        step = ("tanh" if name == "tanh" else "scale" if name in _SCALING else str(like.dtype),
                lambda z: func(z, *rest, **kwargs), number)  # fmt: skip
        return self._with(dtype=like.dtype, steps=(*self._steps, step))

    def _rows(self, name: str, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Parts and other shapes of the leading dimensions: those of the input."""
        width, last = self._hidden.shape[-1], self.dim() - 1
        if last < 1 or kwargs.keys() - {"dim"}:
            return NotImplemented
        if name in ("view", "reshape") and not kwargs:
            sizes = tuple(rest[0]) if len(rest) == 1 and not isinstance(rest[0], int) else rest
            if not all(isinstance(n, int) for n in sizes) or len(sizes) < 2 or sizes[-1] != self.shape[-1]:
                return NotImplemented
            hidden = self._hidden.reshape(*sizes[:-1], width)
        elif name == "__getitem__" and _leading(rest[0], last):
            hidden = self._hidden[rest[0]]
        elif name == "split" and rest and (rest[1:] or (kwargs.get("dim", 0),))[0] in range(last):
            return tuple(
                self._with(h, part_of=(self, lambda z, i=i: func(z, *rest, **kwargs)[i]))
                for i, h in enumerate(func(self._hidden, *rest, **kwargs))
            )
        else:
            return NotImplemented
        return self._with(hidden, part_of=(self, lambda z: func(z, *rest, **kwargs)))

    @torch.no_grad()
    def _argmax(self) -> Tensor:
        self._head.check()
        rows = torch.split(self._hidden.flatten(0, -2), chunked_loss.WHOLE_TOKENS)
        parts = [self._head.run(h, self._steps).argmax(-1) for h in rows]
        return torch.cat(parts).view(self.shape[:-1])

    def _cross_entropy(
        self, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
        reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Any:  # fmt: skip
        plain = weight is None and size_average is None and reduce is None and not label_smoothing
        if not plain or self.dim() != 2 or target.dtype is not torch.long or target.shape != self.shape[:1]:
            return NotImplemented
        where = (target != ignore_index).nonzero().squeeze(1)
        everyone = where.numel() == target.numel()
        hidden = self._hidden if everyone else self._hidden.index_select(0, where)
        targets = target if everyone else target.index_select(0, where)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._head.grad):
            found = self._losses(hidden, targets, "none" if reduction == "none" else "sum").to(self.dtype)
            self._head.watch.chunked += threading.get_ident() in self._head.watch.inside
            if reduction != "none":
                return found / where.numel() if reduction == "mean" else found
            return found if everyone else found.new_zeros(target.shape).index_put((where,), found)

    def _losses(self, hidden: Tensor, targets: Tensor, reduction: Any) -> Tensor:
        self._head.check()
        head: Any = self._head.module
        affine = self._affine()
        trains = any(p.requires_grad for p in head.parameters())
        if self._head.matrix and affine is not None and not (reduction == "none" and trains and self._head.grad):
            dtype = self._head.autocast
            if dtype is not None and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16):
                hidden = hidden.to(dtype)
            return chunked_cross_entropy(
                hidden, head.weight, targets, head.bias, scale=affine[0], softcap=affine[1], native_products=True,
                chunk_vocab=chunked_loss.CHUNK_VOCAB, chunk_tokens=chunked_loss.CHUNK_TOKENS, reduction=reduction,
            )  # fmt: skip
        run, steps = self._head.run, self._steps
        losses = cross_entropy_by_rows(lambda h, _: run(h, steps), hidden, targets, chunked_loss.WHOLE_TOKENS)
        return losses if reduction == "none" else losses.sum()

    def _affine(self) -> tuple[float, float | None] | None:
        """The steps as (scale, softcap) of `chunked_cross_entropy`; None where they are something else."""
        before, after, capped = 1.0, 1.0, False
        for name, _, number in self._steps:
            if name == "tanh":
                if capped:
                    return None
                capped = True
            elif name == "scale" and capped:
                after *= number
            elif name == "scale":
                before *= number
            elif name != "torch.float32":  # a cast that rounds, or one to float64
                return None
        return (before * after, after) if capped else (before, None)


def _leading(index: Any, last: int) -> bool:
    """True for an index that takes all of dimension `last`, the vocabulary."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is None or isinstance(item, (bool, list)) for item in items):
        return False
    whole = [isinstance(item, slice) and item == slice(None) for item in items]
    taken = sum(0 if item is Ellipsis else _dims(item) for item in items)
    if any(item is Ellipsis for item in items):
        return (items[-1] is Ellipsis and taken <= last) or whole[-1]
    return taken <= last or (taken == last + 1 and whole[-1])


def _dims(item: Any) -> int:
    return item.dim() if isinstance(item, Tensor) and item.dtype is torch.bool else 1


def _lost(grad: Tensor | None) -> None:
    if grad is None:  # DDP that looks for unused parameters hands outputs through a function, and None comes back
        return
    raise RuntimeError(
        "A gradient came to logits that are made when they are asked for, by a call that torch does not show (an "
        "autograd.Function of somebody): give it `logits + 0`, or call `fastpeft.unaccelerate`."
    )
