"""OLoRA: B has orthonormal columns, from the QR decomposition of W (arXiv 2406.01775)."""

from __future__ import annotations

import torch
from torch import Tensor


def olora(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A, the first r rows of R, and B, the first r columns of Q, for W = Q R."""
    q, upper = torch.linalg.qr(w)
    return upper[:r], q[:, :r]
