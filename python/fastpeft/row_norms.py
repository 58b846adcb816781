"""|W + s B A| of each row of a base weight, with no dense W + B A, and the norms that evaluation keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import QuantWeight, dora_norm

from .sharded import is_sharded
from .weights import BaseWeight, Quant4bitWeight, wide

SAMPLED = 8  # elements by which a write without a version is noticed


def norms(kind: type[BaseWeight], module: nn.Module, a: Tensor, b: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    """|W + scaling b a| of each row, in at least float32, under autocast too. Differentiable in a and b."""
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0
    a, b = a.flatten(1), b.flatten(1)
    w = _matrix(kind, module)
    if w is not None:
        return dora_norm(w, a, b, scaling)
    dtype = torch.promote_types(wide(kind.dtype(module)), wide(a.dtype))
    a, b = a.to(dtype), b.to(dtype) * scaling

    def tile(rows: slice, a: Tensor, b: Tensor) -> Tensor:  # decoded again for its gradient rather than kept
        norm: Tensor = torch.linalg.vector_norm(torch.addmm(kind.rows(module, rows).to(dtype), b, a), dim=1)
        return norm

    graph = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    with torch.autocast(a.device.type, enabled=False):
        tiles = [(t, a, b[t]) for t in kind._tiles(module)]
        return torch.cat([checkpoint(tile, *t, use_reentrant=False) if graph else tile(*t) for t in tiles])


def _matrix(kind: type[BaseWeight], module: nn.Module) -> Tensor | QuantWeight | None:
    """W as `dora_norm` reads it in place; None where it has to be decoded in tiles."""
    if issubclass(kind, Quant4bitWeight):
        return kind.quant(module)
    if kind.quantized is not None:
        return None
    w = kind.read(module)[0]
    return None if is_sharded(w) else w.detach().flatten(1)


class Kept:
    """A value that is computed anew when one of the tensors that it came from was replaced or written to.

    A tensor made in inference mode has no version: then nothing is kept. `weight.data.mul_(2)` writes without a new
    version; it is noticed by a few elements on the CPU, where reading them does not wait for a device.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int, int, Any, bytes]] = []
        self._numbers: tuple[Any, ...] = ()
        self._value: Tensor | None = None

    def get(self, tensors: Sequence[Tensor], numbers: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it gave when `tensors` and `numbers` were the same. Constant, also under inference_mode."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return make()
        if self._value is not None and numbers == self._numbers and len(tensors) == len(self._seen):
            for t, (kept, version, address, view, content) in zip(tensors, self._seen, strict=True):
                if t is not kept or t._version != version or t.data_ptr() != address or view.tobytes() != content:
                    break
            else:
                return self._value
        self._value = None
        if any(t.is_inference() for t in tensors):
            with torch.no_grad():
                return make()
        with torch.inference_mode(False), torch.no_grad():
            self._value = make()
        views = map(_probe, tensors)
        self._seen = [(t, t._version, t.data_ptr(), v, v.tobytes()) for t, v in zip(tensors, views, strict=True)]
        self._numbers = numbers
        return self._value


def _probe(t: Tensor) -> Any:
    """A few elements of a tensor's memory as a numpy array; an empty one where they cannot be read at once."""
    if t.device.type != "cpu" or is_sharded(t) or not t.is_contiguous() or not t.numel():
        return numpy.empty(0)
    flat = t.detach().view(-1)
    if flat.dtype is torch.bfloat16:
        flat = flat.view(torch.int16)
    return flat[:: flat.numel() // SAMPLED + 1].numpy()
