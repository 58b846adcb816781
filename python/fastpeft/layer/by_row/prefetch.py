"""Fetching what a check of many Python objects is about to read.

Whether a layer's adapters are as they were is asked at every forward. In a model the layer's objects have left the
caches since the last one: with 64 adapters the answer is in some thousand lines of memory, and Python would wait for
each in turn. One native call asks for all of them at once. Addresses may be old, or be none: nothing is read by it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from ctypes import string_at
from struct import unpack
from typing import Any

from torch import Tensor

from peft_kernels import native

_LINE, _PAGE = 64, 4096


class Prefetch:
    """A call of it fetches these addresses; without the native library it does nothing."""

    def __init__(self, addresses: Iterable[int]) -> None:
        self._lines = array("q", sorted({address & -_LINE for address in addresses}))
        self._at = self._lines.buffer_info()
        self._run = None if native.available() else native.cpu().pk_cpu_prefetch

    def __call__(self) -> None:
        if self._run is not None:
            self._run(*self._at)


def of_objects(objects: Iterable[object]) -> Iterator[int]:
    """Where their counts of references are."""
    return map(id, objects)


def of_dicts(dicts: Iterable[dict[Any, Any]]) -> Iterator[int]:
    """Where their keys are: all of a large one, the first of a small one."""
    own = dict.__basicsize__
    for each in dicts:
        size = each.__sizeof__() - own
        yield from (id(each), id(each) + own - 1)
        for keys in _pointers(id(each) + 16, own - 16):
            yield from range(keys, keys + (size if len(each) > 4 else 2 * _LINE), _LINE)


def of_tensors(tensors: Iterable[Tensor]) -> Iterator[int]:
    """What is read for their versions and addresses: torch's object, what it points to first, and its last fields."""
    for each in tensors:
        impl = each._cdata
        yield from (id(each), id(each) + 31, impl, impl + 48, impl + 152, impl + 176)
        pointers = [*_pointers(impl, 48)]
        yield from (*pointers, *(storage + 80 for storage in pointers[1:2]))


def _pointers(address: int, size: int) -> Iterator[int]:
    """The words of an object that can be addresses; those up to the end of its page, in case it is shorter."""
    words = min(size, _PAGE - address % _PAGE) // 8
    return (w for w in unpack(f"={words}Q", string_at(address, words * 8)) if w >> 16 and not (w >> 47 or w & 7))
