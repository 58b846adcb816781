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
    """The keys that queries see: up to their own (`causal`), of `spans` [B or 1, T, 2], of `keep` [B or 1, T, S].

    blind: bool [B or 1, T], the queries that see none, where they get the mean of all values: a mask of numbers takes
    the same from each score. None: there are none, or they get zeros.
    """

    causal: bool
    spans: Tensor | None = None
    keep: Tensor | None = None
    blind: Tensor | None = None

    def up_to_now(self, queries: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [B, S, G, D] up to the key of the last query. A cache of a fixed size comes without a mask when it is
        filled first, with the keys to come behind; the operator takes the queries for the last of the keys."""
        return (k[:, :queries], v[:, :queries]) if self.causal and k.shape[1] > queries else (k, v)


class LazyMask(LazyTensor):
    """A mask [B, 1, T, S] of which the spans are known, int32 [B or 1, T, 2]; `make` makes the whole of it.

    As a mask of numbers it leaves queries blind whose spans are empty.
    """

    _seen: Seen
    _make: Callable[[], Tensor]
    _as_made: int | Tensor

    @staticmethod
    def __new__(cls, spans: Tensor, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> LazyMask:
        self: LazyMask = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=spans.device
        )
        none = spans[..., 0] == spans[..., 1]
        blind = none if dtype is not torch.bool and bool(none.any()) else None
        self._seen, self._make, self._made = Seen(False, spans=spans, blind=blind), make, None
        return self

    def made(self, why: str, shared: bool = False) -> Tensor:
        if self._made is None:
            self._made = self._make()
            self._as_made = _as_it_is(self._made)
        return self._made

    @property
    def unchanged(self) -> bool:
        """False once somebody wrote to the whole of it."""
        return self._made is None or _is(self._made, self._as_made)

    def _lazily(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self if func is Tensor.contiguous and not rest and not kwargs else NotImplemented


class Masks:
    """The last few masks, and what was found of each: a model with windows has two in a forward."""

    def __init__(self) -> None:
        self._found: tuple[tuple[ref[Tensor], int | Tensor, Seen], ...] = ()  # whole, as threads share it

    def seen(self, mask: Tensor | None, queries: int, causal: bool) -> Seen | None:
        """mask: None (see `causal`), [B or 1, 1, T, S] of bool, or a float one that is 0 where a key is seen and the
        least number elsewhere. None for a mask that says more than that."""
        if mask is None:
            return Seen(causal and queries > 1)  # one query is the last: it sees all
        if torch.compiler.is_compiling():  # a graph keeps nothing, and what it computes hangs on no values
            rows = _rows(mask, queries) if mask.dtype is torch.bool else None
            return None if rows is None else Seen(False, keep=rows)
        if isinstance(mask, LazyMask):
            if mask.unchanged:
                return mask._seen
            mask = mask.made("written to")
        for kept, as_it_was, found in self._found:
            if kept() is mask and _is(mask, as_it_was):
                return found
        made = _read(mask, queries)
        if made is not None:
            alive = tuple(entry for entry in self._found if entry[0]() is not None)
            self._found = (*alive[-3:], (ref(mask), _as_it_is(mask), made))
        return made


def _as_it_is(mask: Tensor) -> int | Tensor:
    """A mask's version; of a tensor of inference mode, which has none, a copy."""
    return mask.clone() if mask.is_inference() else mask._version


def _is(mask: Tensor, as_it_was: int | Tensor) -> bool:
    return torch.equal(mask, as_it_was) if isinstance(as_it_was, Tensor) else mask._version == as_it_was


def _rows(mask: Tensor, queries: int) -> Tensor | None:
    """[B or 1, T, S] of a mask that is the same for all heads."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, queries) or mask.requires_grad:
        return None
    return mask.detach()[:, 0].expand(-1, queries, -1)


def _read(mask: Tensor, queries: int) -> Seen | None:
    rows = _rows(mask, queries)
    if rows is None:
        return None
    mask, blind = rows, None
    if mask.is_floating_point():
        least = torch.finfo(mask.dtype).min
        keep = mask == 0
        if not bool((keep | (mask <= least)).all()):  # a bias
            return None
        blind = (mask == least).all(-1)
        blind = blind if bool(blind.any()) else None
    elif mask.dtype is torch.bool:
        keep = mask
    else:
        return None
    spans = spans_of(keep)
    return Seen(False, spans, keep.contiguous() if spans is None else None, blind)


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
