"""Values that are kept while the tensors that they came from stay as they are.

A tensor made in inference mode has no version: nothing is kept of it. `weight.data.mul_(2)` writes without a new
version; it is noticed by a few elements on the CPU, where reading them does not wait for a device.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from ctypes import string_at
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from peft_kernels import native

from ...files.whole import is_sharded
from ...layer.by_row.prefetch import of_objects, of_tensors

SAMPLED = 8  # elements by which a write without a version is noticed


class Seen:
    """Tensors as they were when this was made. None of them may be of inference mode.

    samples: elements of each by which a write without a version is noticed.
    """

    def __init__(self, tensors: Sequence[Tensor], samples: int = SAMPLED) -> None:
        self._tensors, self._versions = list(tensors), [t._version for t in tensors]
        self._addresses = [*map(Tensor.data_ptr, tensors)]
        places: dict[int, list[int]] = {}  # of elements in memory, by their size in bytes
        for t in tensors:
            size = min(t.element_size(), 8)
            places.setdefault(size, []).extend(_sampled(t, samples))
        self._samples = [_Samples(at, size) for size, at in places.items() if at]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and none was written to."""
        held = self._tensors
        return len(tensors) == len(held) and all(map(operator.is_, tensors, held)) and self.untouched()

    def untouched(self) -> bool:
        """Whether no one of them was written to."""
        if not self.unversioned() or [*map(Tensor.data_ptr, self._tensors)] != self._addresses:
            return False
        return all(map(_Samples.unchanged, self._samples))

    def unversioned(self) -> bool:
        """`untouched` at a fraction of its time: writes that leave no version are not noticed."""
        return [t._version for t in self._tensors] == self._versions

    def addresses(self) -> Iterator[int]:
        """Where in memory `untouched` looks, for `Prefetch`."""
        yield from of_tensors(self._tensors)
        yield from of_objects(self._addresses)
        for each in self._samples:
            yield from each.places


class _Samples:
    """What elements of one size are. Their memory must be there still whenever they are looked at."""

    def __init__(self, addresses: Sequence[int], size: int) -> None:
        self.places = array("q", addresses)
        self._at, self._size = self.places.buffer_info(), size
        self._content = self._read()
        self._run = None if native.available() else native.cpu().pk_cpu_unchanged

    def _read(self) -> bytes:
        return b"".join(map(string_at, self.places, repeat(self._size)))

    def unchanged(self) -> bool:
        if self._run is None:
            return self._read() == self._content
        return bool(self._run(*self._at, self._size, self._content))


class Kept:
    """A value that is computed anew when one of the tensors that it came from was replaced or written to."""

    def __init__(self) -> None:
        self._seen: Seen | None = None
        self._numbers: tuple[Any, ...] = ()
        self._value: Tensor | None = None

    def get(self, tensors: Sequence[Tensor], numbers: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it gave when `tensors` and `numbers` were the same. Constant, also under inference_mode."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return make()
        seen = self._seen
        if self._value is not None and seen is not None and numbers == self._numbers and seen.same(tensors):
            return self._value
        self._value = None
        if any(t.is_inference() for t in tensors):
            with torch.no_grad():
                return make()
        with torch.inference_mode(False), torch.no_grad():
            self._value = make()
        self._seen, self._numbers = Seen(tensors), numbers
        return self._value


def _sampled(t: Tensor, samples: int) -> Sequence[int]:
    """Addresses of a few elements of a tensor; none where they cannot be read at once."""
    if t.device.type != "cpu" or is_sharded(t) or not t.numel():
        return ()
    dense = t.is_contiguous() or t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).is_contiguous()
    first, size, count = t.data_ptr(), t.element_size(), t.numel()
    return range(first, first + count * size, (count // samples + 1) * size) if first and dense else ()
