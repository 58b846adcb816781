"""Values that are kept while the tensors that they came from stay as they are.

`peft_kernels.Fingerprint` says what is noticed of a write, and what is not: a few elements written without a version.
`AdapterLayer.changed()` is for those; its version is among the numbers that a value is kept by. Where a fingerprint
cannot tell (other devices than the CPU, inference mode, sharded tensors), nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import Fingerprint


class Cache:
    """A value that is computed anew when one of the tensors that it came from was replaced or written to. Threads may
    share it."""

    def __init__(self) -> None:
        # what was seen of the tensors, the numbers, the value: one object, so that no thread meets half of it
        self._kept: tuple[Fingerprint, tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has tensors of its own
        return Cache, ()

    def get(self, tensors: Sequence[Tensor], numbers: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it gave when `tensors` and `numbers` were the same. Constant, also under inference_mode."""
        kept = None if torch.compiler.is_compiling() else self._kept
        if kept is not None and numbers == kept[1] and kept[0].same(tensors):
            return kept[2]
        self._kept = kept = None
        seen = None if torch.compiler.is_compiling() else Fingerprint(tensors)
        if seen is None or not seen.known:
            with torch.no_grad():
                return make()
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._kept = seen, numbers, value
        return value
