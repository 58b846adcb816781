"""Values that are kept while the tensors that they came from stay as they are.

A tensor made in inference mode has no version: nothing is kept of it. `weight.data.mul_(2)` writes without a new
version; it is noticed by a few elements on the CPU, where reading them does not wait for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from .sharded import is_sharded

SAMPLED = 8  # elements by which a write without a version is noticed


class Seen:
    """Tensors as they were when this was made. None of them may be of inference mode."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        views = map(_probe, tensors)
        self._of = [(t, t._version, t.data_ptr(), v, v.tobytes()) for t, v in zip(tensors, views, strict=True)]
        self._versions = [(t, t._version) for t in tensors]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and none was written to."""
        if len(tensors) != len(self._of) or any(t is not o[0] for t, o in zip(tensors, self._of, strict=True)):
            return False
        return self.untouched()

    def untouched(self) -> bool:
        """Whether no one of them was written to."""
        for t, version, address, view, content in self._of:
            if t._version != version or t.data_ptr() != address or view.tobytes() != content:
                return False
        return True

    def unversioned(self) -> bool:
        """`untouched` at a tenth of its time: writes that leave no version are not noticed."""
        return all(t._version == version for t, version in self._versions)


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


def _probe(t: Tensor) -> Any:
    """A few elements of a tensor's memory as a numpy array; an empty one where they cannot be read at once."""
    if t.device.type != "cpu" or is_sharded(t) or not t.is_contiguous() or not t.numel():
        return numpy.empty(0)
    flat = t.detach().view(-1)
    if flat.dtype is torch.bfloat16:
        flat = flat.view(torch.int16)
    return flat[:: flat.numel() // SAMPLED + 1].numpy()
