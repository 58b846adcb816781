"""Normalisation layers as base weights: whatever multiplies by a vector `weight` and may add a `bias`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from .base import BaseWeight


class NormWeight(BaseWeight):
    """LayerNorm, RMSNorm of any library, GroupNorm, BatchNorm: modules with no parameters but a weight and a bias."""

    kind = "norm"
    label = "Norm"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        if weight is None or module._modules or set(module._parameters) - {"weight", "bias"}:
            return False
        return weight.dim() == 1 or isinstance(module, nn.LayerNorm)

    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], shape[0]

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        tensors = {"weight": w} if b is None else {"weight": w, "bias": b}
        return functional_call(self.module, tensors, (x,))  # type: ignore[no-any-return]
