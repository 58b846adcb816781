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

    @classmethod
    def in_features(cls, module: nn.Module, shape: tuple[int, ...]) -> int:
        return shape[0]

    @classmethod
    def apply(cls, module: nn.Module, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return functional_call(module, {"weight": w} if b is None else {"weight": w, "bias": b}, (x,))  # type: ignore[no-any-return]
