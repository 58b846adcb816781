"""|W + s B A| of each row of a base weight, with no dense W + B A."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels import QuantWeight, dora_norm

from ...files.whole import is_sharded
from ...weights.base import BaseWeight, wide
from ...weights.nf4 import Quant4bitWeight


def norms(base: BaseWeight, a: Tensor, b: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
    """|W + scaling b a| of each row, in at least float32, under autocast too. Differentiable in a and b."""
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0
    a, b = a.flatten(1), b.flatten(1)
    w: Tensor | QuantWeight | None = base.quant() if isinstance(base, Quant4bitWeight) else None
    if base.quantized is None and not is_sharded(whole := base.read()[0]):
        w = whole.detach().flatten(1)
    if w is not None:  # else it has to be decoded in tiles
        return dora_norm(w, a, b, scaling)
    dtype = torch.promote_types(wide(base.dtype), wide(a.dtype))
    a, b = a.to(dtype), b.to(dtype) * scaling

    def tile(rows: slice, a: Tensor, b: Tensor) -> Tensor:  # decoded again for its gradient rather than kept
        norm: Tensor = torch.linalg.vector_norm(torch.addmm(base.rows(rows).to(dtype), b, a), dim=1)
        return norm

    graph = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    with torch.autocast(a.device.type, enabled=False):
        tiles = [(t, a, b[t]) for t in base.tiles()]
        return torch.cat([checkpoint(tile, *t, use_reentrant=False) if graph else tile(*t) for t in tiles])
