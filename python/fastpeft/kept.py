"""Values that are kept while the tensors that they came from stay as they are.

A tensor made in inference mode has no version: nothing is kept of it. `weight.data.mul_(2)` writes without a new
version; it is noticed by a few elements on the CPU, where reading them does not wait for a device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from .sharded import is_sharded

SAMPLED = 8  # elements by which a write without a version is noticed


class Seen:
    """Tensors as they were when this was made. None of them may be of inference mode.

    samples: elements of each by which a write without a version is noticed.
    """

    def __init__(self, tensors: Sequence[Tensor], samples: int = SAMPLED) -> None:
        self._tensors, self._versions = list(tensors), [t._version for t in tensors]
        self._addresses = [*map(Tensor.data_ptr, tensors)]
        self._views = [_probe(t, samples) for t in tensors]
        self._content = b"".join(map(numpy.ndarray.tobytes, self._views))

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and none was written to."""
        held = self._tensors
        return len(tensors) == len(held) and all(map(operator.is_, tensors, held)) and self.untouched()

    def untouched(self) -> bool:
        """Whether no one of them was written to."""
        if not self.unversioned() or [*map(Tensor.data_ptr, self._tensors)] != self._addresses:
            return False
        return b"".join(map(numpy.ndarray.tobytes, self._views)) == self._content

    def unversioned(self) -> bool:
        """`untouched` at a fraction of its time: writes that leave no version are not noticed."""
        return [t._version for t in self._tensors] == self._versions


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


def _probe(t: Tensor, samples: int) -> Any:
    """A few elements of a tensor's memory as a numpy array; an empty one where they cannot be read at once."""
    if t.device.type != "cpu" or is_sharded(t) or not t.numel():
        return numpy.empty(0)
    t = t.detach()
    t = t if t.is_contiguous() else t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))  # as it lies there
    if not t.is_contiguous():
        return numpy.empty(0)
    flat = t.view(-1)
    if flat.dtype is torch.bfloat16:
        flat = flat.view(torch.int16)
    return flat[:: flat.numel() // samples + 1].numpy()
