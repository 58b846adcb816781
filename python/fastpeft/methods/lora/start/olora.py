"""OLoRA: B has orthonormal columns, from the QR decomposition of W (arXiv 2406.01775)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...method import LayerInfo
from . import Start


class Olora(Start):
    name = "olora"
    shown = "OLoRA"

    def factors(self, config: Any, info: LayerInfo, scaling: float, w: Tensor) -> tuple[Tensor, Tensor, None]:
        """A, the first r rows of R, and B, the first r columns of Q, for W = Q R."""
        q, upper = torch.linalg.qr(w)
        return upper[: config.r], q[:, : config.r], None
