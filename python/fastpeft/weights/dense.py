"""Layers that store a plain weight: linear, embedding, convolution, normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peft_kernels import QuantWeight

from ..files.offloaded import brought
from .base import BaseWeight
from .lookups import Lookups


class LinearWeight(BaseWeight):
    """nn.Linear and subclasses of it that store a plain weight."""

    modules = nn.Linear

    def frozen(self) -> Callable[[], Tensor] | None:
        return super().frozen() if type(self.module).forward is nn.Linear.forward else None

    def fast(self) -> Callable[[], Tensor | QuantWeight | None] | None:
        module = self.module
        if type(module).forward is not nn.Linear.forward:
            return None
        parameters, hooks, pre = module._parameters, module._forward_hooks, module._forward_pre_hooks
        backward, own = module._backward_hooks, vars(module)

        def weight() -> Tensor | None:
            w: Tensor | None = parameters.get("weight")
            return None if w is None or w.requires_grad or hooks or pre or backward or "forward" in own else w

        return weight

    def note(self, lookups: Lookups) -> None:
        lookups.calls_of(self.module)
        lookups.entries(self.module._parameters, *self.names)


class Conv1DWeight(BaseWeight):
    """transformers' Conv1D (GPT-2): a linear layer that stores W transposed."""

    modules = ("Conv1D", "transformers")
    fan_in_fan_out = True


class EmbeddingWeight(BaseWeight):
    """nn.Embedding, as the linear layer that acts on one-hot rows: W = weight^T."""

    modules = nn.Embedding
    kind, label = "embedding", "Embedding"
    names = ("weight", None)

    def check(self) -> None:
        if self.module.max_norm is not None:
            raise ValueError("Embedding(max_norm=...) changes its weight in every forward: no adapter of it can merge")

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return scaled(self.module, F.embedding(x, w.t(), padding_idx=self.module.padding_idx))


def scaled(embedding: nn.Module, y: Tensor) -> Tensor:
    """Rows as an embedding gives them out: Gemma multiplies those that it looks up."""
    scale = getattr(embedding, "embed_scale", None)
    return y if scale is None else y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class ConvWeight(BaseWeight):
    """nn.Conv1d, Conv2d and Conv3d, grouped or not, with any padding mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        dims = len(self.module.kernel_size)
        self.kind, self.label = f"conv{dims}d", f"Conv{dims}d"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not getattr(module, "transposed", False)

    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], int(self.module.in_channels)

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return self.module._conv_forward(x, w, b)  # type: ignore[no-any-return]


class NormWeight(BaseWeight):
    """LayerNorm, RMSNorm of any library, GroupNorm, BatchNorm: modules with no parameters but a weight and a bias."""

    kind, label = "norm", "Norm"

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
        with brought(self.module):
            return functional_call(self.module, tensors, (x,))  # type: ignore[no-any-return]
