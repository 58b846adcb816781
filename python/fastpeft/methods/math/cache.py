"""Values that are kept while the tensors that they came from stay as they are.

`peft_kernels.Fingerprint` says what is noticed of a write, and what is not: a few elements written without a version.
`AdapterLayer.changed()` is for those; its version is among the numbers that a value is kept by. Where a fingerprint
cannot tell (other devices than the CPU, inference mode, sharded tensors), nothing is kept; or, where a reader asks for
it, what comes from frozen tensors of another device, by their versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import Fingerprint


class _Versions:
    """Frozen tensors on a device whose elements are not looked at: the same objects, in their places, not written to.

    Trained ones are not known: FSDP2 gathers them anew into the same tensors, and leaves their versions."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        transformed = torch._C._are_functorch_transforms_active()
        self.known = not transformed and not any(t.is_cpu or t.is_inference() or t.requires_grad for t in tensors)
        self._seen = self._look() if self.known else []

    def _look(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in self._tensors]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the same tensors, and unchanged."""
        own = self._tensors
        return len(tensors) == len(own) and all(p is q for p, q in zip(tensors, own, strict=True)) and (
            self._seen == self._look()
        )  # fmt: skip


class Cache:
    """A value that is computed anew when one of the tensors that it came from was replaced or written to. Threads may
    share it. by_version: on other devices than the CPU, too, of frozen tensors."""

    def __init__(self, by_version: bool = False) -> None:
        self._by_version = by_version
        # what was seen of the tensors, the numbers, the value: one object, so that no thread meets half of it
        self._kept: tuple[Fingerprint | _Versions, tuple[Any, ...], Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has tensors of its own
        return Cache, (self._by_version,)

    def get(self, tensors: Sequence[Tensor], numbers: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """make(), or what it gave when `tensors` and `numbers` were the same. Constant, also under inference_mode."""
        kept = None if torch.compiler.is_compiling() else self._kept
        if kept is not None and numbers == kept[1] and kept[0].same(tensors):
            return kept[2]
        self._kept = kept = None
        seen: Any = None if torch.compiler.is_compiling() else Fingerprint(tensors)
        if seen is not None and not seen.known and self._by_version:
            seen = _Versions(tensors)
        if seen is None or not seen.known:
            with torch.no_grad():
                return make()
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._kept = seen, numbers, value
        return value
