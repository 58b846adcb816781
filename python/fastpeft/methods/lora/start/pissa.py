"""PiSSA: the adapter takes over the principal singular components of W, the base keeps the rest (arXiv 2404.02948)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ...method import LayerInfo
from . import MAX_ITERATIONS, Start


class Pissa(Start):
    """`pissa` by a full SVD, or `pissa_niter_<n>` by so many subspace iterations of a randomised one, which is
    faster."""

    name = "pissa"
    shown = "PiSSA"

    def accepts(self, value: Any) -> bool:
        return value == "pissa" or _niter(value) is not None

    def check_config(self, config: Any) -> None:
        niter = _niter(config.init_lora_weights)
        if niter is not None and niter > MAX_ITERATIONS:
            raise ValueError(f"init_lora_weights={config.init_lora_weights!r}: at most {MAX_ITERATIONS} iterations")

    def factors(self, config: Any, info: LayerInfo, scaling: float, w: Tensor) -> tuple[Tensor, Tensor, None]:
        """A [r, in] and B [out, r] with scaling * B A the best rank-r approximation of W [out, in]."""
        r, niter = config.r, _niter(config.init_lora_weights)
        if niter is None:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            u, s, vh = u[:, :r], s[:r], vh[:r]
        else:
            u, s, v = torch.svd_lowrank(w, r, niter=niter)
            vh = v.t()
        root = torch.diag(torch.sqrt(s / scaling))
        return root @ vh, u @ root, None


def _niter(value: Any) -> int | None:
    found = re.fullmatch(r"pissa_niter_(\d{1,9})", value) if isinstance(value, str) else None
    return int(found[1]) if found else None
