"""Masks of transformers as the op `attention` takes them: the keys that a query sees, as a range wherever they are one.

A mask is made once a forward and given to each layer; so is what is found here. A `LazyMask` (`masking.py` makes it)
says it straight; of others it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from .lazy_tensor import LazyTensor


class Seen(NamedTuple):
    """The keys that queries see: up to their own (`causal`), of `spans` [B or 1, T, 2], of `keep` [B or 1, T, S]."""

    causal: bool
    spans: Tensor | None = None
    keep: Tensor | None = None


class LazyMask(LazyTensor):
    """A mask [B, 1, T, S] of which the spans are known, int32 [B or 1, T, 2]; `make` makes the whole of it."""

    _seen: Seen
    _make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, spans: Tensor, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> LazyMask:
        self: LazyMask = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=spans.device
        )
        self._seen, self._make, self._made = Seen(False, spans=spans), make, None
        return self

    def made(self, why: str, shared: bool = False) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _lazily(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self if func is Tensor.contiguous and not rest and not kwargs else NotImplemented


class Masks:
    """The last few masks, and what was found of each: a model with windows has two in a forward."""

    def __init__(self) -> None:
        self._found: tuple[tuple[ref[Tensor], int, Seen], ...] = ()  # whole, as threads share it

    def seen(self, mask: Tensor | None, queries: int, causal: bool) -> Seen | None:
        """mask: None (see `causal`), [B or 1, 1, T, S] of bool, or a float one that is 0 where a key is seen and the
        least number elsewhere. None for a mask that says more than that."""
        if mask is None:
            return Seen(causal and queries > 1)  # one query is the last: it sees all
        if isinstance(mask, LazyMask):
            if mask._made is None or not mask._made._version:
                return mask._seen
            mask = mask._made  # somebody wrote to it
        for kept, version, found in self._found:
            if kept() is mask and version == mask._version:
                return found
        made = _read(mask)
        if made is not None:
            alive = tuple(entry for entry in self._found if entry[0]() is not None)
            self._found = (*alive[-3:], (ref(mask), mask._version, made))
        return made


def _read(mask: Tensor) -> Seen | None:
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.requires_grad:
        return None
    mask = mask.detach()[:, 0]
    if mask.is_floating_point():
        least = torch.finfo(mask.dtype).min
        keep = mask == 0
        if not bool((keep | (mask <= least)).all()):  # a bias
            return None
    elif mask.dtype is torch.bool:
        keep = mask
    else:
        return None
    spans = spans_of(keep)
    return Seen(False, keep=keep.contiguous()) if spans is None else Seen(False, spans=spans)


def spans_of(keep: Tensor) -> Tensor | None:
    """int32 [B, T, 2], the first key that each query sees and the one after the last; None if there are gaps.

    keep: bool [B, T, S].
    """
    if keep.stride(0) == 0:  # one mask, seen by all rows
        keep = keep[:1]
    count = keep.sum(-1, dtype=torch.int32)
    first = keep.to(torch.uint8).argmax(-1).to(torch.int32)  # 0 where nothing is seen
    last = (keep.shape[-1] - keep.flip(-1).to(torch.uint8).argmax(-1)).to(torch.int32)
    end = torch.where(count > 0, last, first)
    return torch.stack((first, end), -1) if torch.equal(end - first, count) else None
