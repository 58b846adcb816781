"""PiSSA: the adapter takes over the principal singular components of W, the base keeps the rest (arXiv 2404.02948)."""

from __future__ import annotations

import torch
from torch import Tensor


def pissa(w: Tensor, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with scaling * B A the best rank-r approximation of W [out, in].

    niter: by so many subspace iterations of a randomised SVD, which is faster; None: by a full SVD.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, v = torch.svd_lowrank(w, r, niter=niter)
        vh = v.t()
    root = torch.diag(torch.sqrt(s / scaling))
    return root @ vh, u @ root
