"""Weights in huge pages of memory (Linux, on a CPU).

Decoding reads every weight once a token. In pages of 4 KiB the processor then looks up an address every 64 lines of
its cache, on a virtual machine in two tables of tables, and one core may get half of the memory's speed. Pages of 2 MiB
are anybody's who asks for them. Nothing moves in the process's own addresses; tensors, views and what is written to
them stay as they are.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from typing import Any

from torch import Tensor

PAGE = 2 << 20
_HUGEPAGE, _COLLAPSE = 14, 25  # of Linux' mman.h; COLLAPSE since 6.1


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Put memory that is mostly of these into huge pages now; the bytes that are in them then.

    tensors: any; only those on the CPU count. A piece of 2 MiB is taken where they fill half of it, neighbours in
    memory together. What else is in there moves along, and the process never grows by more than these tensors have.
    Takes about 0.4 ms a MiB, once. 0 where the system has none (not Linux 6.1 or later) or refuses.
    """
    advise = _madvise()
    if advise is None:
        return 0
    done = 0
    for start, size in _runs(_pieces((s.data_ptr(), s.nbytes()) for s in _storages(tensors))):
        advise(start, size, _HUGEPAGE)
        for at in range(start, start + size, PAGE):  # one that fails, a file's say, is no reason to leave out the next
            done += 0 if advise(at, PAGE, _COLLAPSE) else PAGE
    return done


def _storages(tensors: Iterable[Tensor]) -> Iterator[Any]:
    for t in tensors:
        # a class of its own may keep its elements elsewhere, as one that is sharded does
        if t.device.type == "cpu" and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__:
            yield t.untyped_storage()


def _pieces(memory: Iterable[tuple[int, int]]) -> list[int]:
    """Numbers of the pieces of which (address, bytes), which may be given more than once, fill half or more."""
    filled: Counter[int] = Counter()
    for address, size in set(memory):
        for piece in range(address // PAGE, -(-(address + size) // PAGE)):
            filled[piece] += min(address + size, (piece + 1) * PAGE) - max(address, piece * PAGE)
    return sorted(piece for piece, size in filled.items() if 2 * size >= PAGE)


def _runs(pieces: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of pieces one after the other."""
    for _, run in groupby(enumerate(pieces), lambda pair: pair[1] - pair[0]):
        found = [piece for _, piece in run]
        yield found[0] * PAGE, len(found) * PAGE


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found
