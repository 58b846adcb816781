"""The keys that a query sees, as a range, of what transformers makes masks of.

transformers describes a mask by a function of the positions of a query and a key, put together from a few of its own:
causal, windows, chunks, documents of a packed row. Each of those is an interval of keys for a query, and so is what
several of them leave. A function that is not known here has no spans; its mask is made, and read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from .masks import spans_of

Interval = tuple[Any, Any]  # the first position and that after the last, [B or 1, T]; None: no limit


def mask_spans(
    mask_function: Any, padding: Tensor | None, queries: Tensor, first_key: int, keys: int
) -> Tensor | None:
    """int32 [B or 1, T, 2] of keys from 0 to `keys`; None where a query does not see a range, or it is not known.

    padding: bool [B, S], False for positions that are; queries: positions [T] of the queries; first_key: that of
    the first key.
    """
    found = _interval(mask_function, queries.unsqueeze(0))
    if found is None:
        return None
    if padding is not None:
        kept = _of_padding(padding, first_key, keys)
        if kept is None:
            return None
        found = _both(found, kept)
    first, end = ((queries.new_full((1, 1), limit) if bound is None else bound) - first_key
                  for bound, limit in zip(found, (first_key, first_key + keys), strict=True))  # fmt: skip
    first = first.clamp(0, keys)
    end = torch.maximum(end.clamp(0, keys), first)
    return torch.stack((first.expand_as(end), end), -1).to(torch.int32).expand(-1, queries.shape[0], -1)


def _of_padding(padding: Tensor, first_key: int, keys: int) -> Interval | None:
    seen = padding[:, first_key : first_key + keys]  # what is missing at its end is not seen
    spans = spans_of(seen.unsqueeze(1))
    return None if spans is None else (spans[..., 0] + first_key, spans[..., 1] + first_key)


@cache
def _codes() -> dict[CodeType, Callable[[dict[str, Any], Tensor], Interval | None]]:
    """The body of each of transformers' functions -> its interval, by what the function has captured."""
    from transformers import masking_utils as of

    one = torch.zeros(1, dtype=torch.long)
    known: dict[str, tuple[tuple[Any, ...], Callable[[dict[str, Any], Tensor], Interval | None]]] = {
        "sliding_window_overlay": ((1,), lambda has, q: (q - has["sliding_window"] + 1, None)),
        "sliding_window_bidirectional_overlay": (
            (1,), lambda has, q: (q - has["sliding_window"], q + has["sliding_window"] + 1)
        ),
        "chunked_overlay": ((1, one), _chunk),
        "and_masks": ((), lambda has, q: _all(has["mask_functions"], q)),
    }  # fmt: skip
    codes = {getattr(of, name)(*given).__code__: how for name, (given, how) in known.items() if hasattr(of, name)}
    if hasattr(of, "causal_mask_function"):
        codes[of.causal_mask_function.__code__] = lambda _, q: (None, q + 1)
    if hasattr(of, "bidirectional_mask_function"):
        codes[of.bidirectional_mask_function.__code__] = lambda _, q: (None, None)
    return codes


@cache
def _packed() -> tuple[CodeType | None, CodeType | None]:
    """The bodies of the functions that keep documents of a packed row apart, and that give each its own positions."""
    from transformers import masking_utils as of

    one = torch.zeros(1, 1, dtype=torch.long)
    apart, own = (getattr(of, name, None) for name in
                  ("packed_sequence_mask_function", "remap_positions_for_packed_sequence"))  # fmt: skip
    if apart is None or own is None:
        return None, None
    return apart(one).__code__, own(of.causal_mask_function, one).__code__


def _captured(function: Any) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


def _interval(function: Any, q: Tensor) -> Interval | None:
    """q: positions of queries, [B or 1, T]."""
    how = _codes().get(getattr(function, "__code__", None))  # type: ignore[arg-type]
    return None if how is None else how(_captured(function), q)


def _chunk(has: dict[str, Any], q: Tensor) -> Interval:
    before, size = has["left_padding"].unsqueeze(-1), has["chunk_size"]
    first = (q - before).div(size, rounding_mode="floor") * size + before
    return first, first + size


def _all(functions: Any, q: Tensor) -> Interval | None:
    apart, own = _packed()
    found: Interval = None, None
    document: Interval | None = None
    each: Interval | None
    for function in functions:
        code, has = getattr(function, "__code__", None), _captured(function)
        if code is not None and code is apart:
            document = each = _document(has["packed_sequence_mask"])
        elif code is not None and code is own:
            if document is None:  # only within a document do positions go up by one
                return None
            each = _of_document(has, q)
        else:
            each = _interval(function, q)
        if each is None:
            return None
        found = _both(found, each)
    return found


def _document(numbers: Tensor) -> Interval:
    """numbers: the document of each token, [B, T], which rises along a row."""
    numbers = numbers.contiguous()
    return torch.searchsorted(numbers, numbers), torch.searchsorted(numbers, numbers, right=True)


def _of_document(has: dict[str, Any], q: Tensor) -> Interval | None:
    positions = has["position_ids"]
    found = _interval(has["mask_function"], positions)
    if found is None:
        return None
    first, end = (None if bound is None else bound - positions + q for bound in found)
    return first, end


def _both(one: Interval, other: Interval) -> Interval:
    pairs = zip(one, other, (torch.maximum, torch.minimum), strict=True)
    first, end = (b if a is None else a if b is None else pick(a, b) for a, b, pick in pairs)
    return first, end
