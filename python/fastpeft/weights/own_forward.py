"""Layers that only their own package computes with: EETQ, Intel Neural Compressor, Transformer Engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import has_base
from .foreign import OpaqueWeight

_TE = ("Linear", "LayerNormLinear", "LayerNormMLP")


class EetqWeight(OpaqueWeight):
    """EetqLinear, EETQ's or transformers': int8 in the order of its CUDA kernel, float16."""

    label, quantized = "EetqLoraLinear", "eetq"
    names = ("weight", "bias")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return any(has_base(module, "EetqLinear", package) for package in ("eetq", "transformers"))

    @property
    def shape(self) -> tuple[int, ...]:
        k, n = self.module.weight.shape  # as its kernel takes it
        return int(n), int(k)

    @property
    def dtype(self) -> torch.dtype:
        named = (getattr(self.module, name, None) for name in ("weight_scales", "scales"))
        scales = next((s for s in named if s is not None), None)
        return torch.float16 if scales is None else scales.dtype


class IncWeight(OpaqueWeight):
    """PatchedLinear of Intel Neural Compressor: float8 weights and inputs."""

    label, quantized = "IncLoraLinear", "inc"
    names = ("weight", "bias")
    factor = 1.0

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return has_base(module, "PatchedLinear", "neural_compressor")

    @property
    def dtype(self) -> torch.dtype:
        kept = self.module.weight.dtype
        return kept if kept.is_floating_point and kept.itemsize > 1 else torch.bfloat16


class TeWeight(OpaqueWeight):
    """Linear, LayerNormLinear and LayerNormMLP of Transformer Engine. The last two normalise their input themselves:
    adapters act on it as it comes, as in PEFT, and methods that change W refuse."""

    label, quantized = "TeLinear", "te"
    factor = 1.0  # in float8 recipes

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return any(has_base(module, name, "transformer_engine") for name in _TE)

    @property
    def _normalises(self) -> bool:
        return not has_base(self.module, "Linear", "transformer_engine")

    @property
    def tensor(self) -> Tensor:
        found: Tensor = next(p for p in self.module.parameters() if p.dim() == 2)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        matrices = [p for p in self.module.parameters() if p.dim() == 2]
        if has_base(self.module, "LayerNormMLP", "transformer_engine"):
            return int(matrices[-1].shape[0]), int(matrices[0].shape[1])
        return int(self.module.out_features), int(self.module.in_features)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def _bias(self) -> Tensor | None:
        return None if self._normalises else super()._bias

    def decoded(self) -> Tensor:
        if self._normalises:
            raise ValueError(f"a {type(self.module).__name__} normalises its input: it has no W that acts on it")
        return super().decoded()
