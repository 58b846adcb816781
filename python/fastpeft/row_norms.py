"""|W + s B A| of each row of a base weight, with no dense W + B A."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import QuantWeight, dora_norm

from .sharded import is_sharded
from .weights.base import BaseWeight, Quant4bitWeight, wide


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
