"""Methods whose update is a product of two thin matrices that follow from what they store: W + B A.

They act on activations, as LoRA does, with its kernel: a layer's FLOPs grow by 3 r (in + out) / (2 in out).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import QuantWeight, lora_linear

from ...weights.base import widened
from ..adapted import AdaptedLayer
from ..method import Fused, Inner, Method

Weight = Tensor | QuantWeight


class FactoredMethod(Method):
    """Subclasses give `factors`. dropout: the container of the dropout module on the input, if there is one."""

    dropout: ClassVar[str] = ""

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        found = self.factors(s, shared, w)
        assert found is not None
        a, b = (widened(t) for t in found)
        return b @ a

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        found = self.factors(s, shared, None)
        assert found is not None
        a, b = found
        x = s.cast(x, a.dtype)
        return plus_product(y, F.linear(getattr(s, self.dropout)(x) if self.dropout else x, a), b.t())

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        def call(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor | None:
            found = self.factors(s, shared, None)
            drop = getattr(s, self.dropout) if self.dropout else None
            p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
            return None if found is None else lora_linear(x, w, *found, 1.0, bias, p)

        return layer.base.fused(call) if self._fusible(s) else None

    def _fusible(self, s: Any) -> bool:
        """True if the factors, which then follow without W, are all that acts in this call."""
        return not self.needs_base_weight


def is_thin(r: int, s: Any) -> bool:
    """Whether factors of this rank add at most a tenth to what the layer costs, so that the kernel is worth it where a
    method could do with fewer products."""
    return 15 * r * (s.in_features + s.out_features) <= s.in_features * s.out_features  # type: ignore[no-any-return]


def plus_product(y: Tensor, z: Tensor, b: Tensor) -> Tensor:
    """y + z b, in one pass over y where the dtypes allow."""
    if not y.dtype == z.dtype == b.dtype:
        return y + z @ b
    rows = y.reshape(-1, y.shape[-1])
    return torch.addmm(rows, z.reshape(len(rows), z.shape[-1]), b).view_as(y)  # z may have no columns


def dropout(p: float) -> nn.Module:
    """The module for a probability, as PEFT makes it."""
    return nn.Dropout(p=p) if p > 0.0 else nn.Identity()
