"""Fingerprints of tensors: the one answer to whether they changed, for everything that is kept of their values.

A write in place raises a tensor's version (`copy_`, `mul_`, an optimizer's step); a replaced tensor is another object.
What leaves neither trace is noticed by memory: `t.data = other` and `t.set_(other)` by its place, writes to a whole
tensor through `.data` (`t.data.mul_(2)`, `t.data.copy_(other)`) or through numpy by a few elements, which are compared.
Nothing sees a write to a few elements alone that leaves no version (`t.data[3] *= 5`, rows of `t.numpy()`), unless it
meets one of those. Whoever writes so has to say it: `layer.changed()` in fastpeft.

Elements can be compared where they are in the CPU's memory. Of other tensors nothing is known without waiting for
their device, and tensors of inference mode have no version: these are never "unchanged".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .checks import whole
from .native import Samples, addresses

SAMPLES = 8  # elements of a tensor that are compared, unless its reader says otherwise

_version: Callable[[Tensor], Any] = Tensor._version.__get__  # type: ignore[attr-defined]  # torch's annotation is int's


def _readable(t: Tensor) -> bool:
    # a class of its own may keep its elements elsewhere, as one that is sharded does
    own = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
    return t.is_cpu and own and t.layout is torch.strided and not t.is_inference() and whole(t)


class Fingerprint:
    """Tensors as they were when this was made. samples: how many elements of each are compared, where it has them."""

    def __init__(self, tensors: Sequence[Tensor], samples: int = SAMPLES) -> None:
        self._tensors = list(tensors)
        self._known = not torch._C._are_functorch_transforms_active() and all(map(_readable, self._tensors))
        if self._known:
            self._versions, self._places = [*map(_version, self._tensors)], addresses(self._tensors)
            self._samples = Samples(self._tensors, samples)

    @property
    def known(self) -> bool:
        """True if it can ever be that nothing changed."""
        return self._known

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the same tensors, and unchanged."""
        return len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors)) and self.unchanged()

    def unchanged(self) -> bool:
        """True if nothing was written to any of them."""
        tensors = self._tensors
        return (
            self._known and [*map(_version, tensors)] == self._versions and addresses(tensors) == self._places
            and self._samples.unchanged()
        )  # fmt: skip

    def same_versions(self) -> bool:
        """`unchanged` at a fraction of its time: writes that leave no version are not noticed."""
        return self._known and [*map(_version, self._tensors)] == self._versions
