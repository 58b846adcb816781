"""nn.Linear with a weight that is one of torchao's tensors. The package is imported only to write one."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.formats import from_torchao

from .base import Saved, put_back
from .foreign import CodedWeight, DecodedWeight, ForeignWeight

_CODED = ("Int8Tensor", "Int4Tensor", "IntxUnpackedToInt8Tensor")
_LYING = ("qdata", "scale", "zero_point")


class _Torchao(ForeignWeight):
    label, quantized = "TorchaoLoraLinear", "torchao"
    names = ("weight", "bias")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        return any(c.__module__.split(".")[0] == "torchao" for c in type(module.weight).__mro__)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype  # type: ignore[no-any-return]

    @property
    def refusal(self) -> str | None:  # type: ignore[override]
        of: Any = type(self.module.weight)
        if hasattr(of, "from_hp") and _settings(self.module.weight) is not None:
            return None
        return f"torchao's {of.__name__} cannot be made again from a dense weight"

    def store(self, w: Tensor) -> None:
        old = self.module.weight
        new: Any = type(old).from_hp(w.to(old.device, old.dtype), **(_settings(old) or {}))
        self.module._parameters["weight"] = nn.Parameter(new, requires_grad=False)

    def save(self) -> Saved:
        return {name: self.module._parameters.get(name) for name in self.names if name}

    def restore(self, saved: Saved) -> None:
        put_back(self.module, saved)


def _settings(tensor: Any) -> dict[str, Any] | None:
    """The arguments of `from_hp` that made a tensor of torchao's; None where they are not known."""
    of, block = type(tensor).__name__, tuple(int(n) for n in getattr(tensor, "block_size", ()))
    if of == "Int4Tensor":
        return {"block_size": list(block)}
    if of not in ("Int8Tensor", "Float8Tensor") or not block:
        return None
    granularity: Any = importlib.import_module("torchao.quantization.granularity")
    n, k = tensor.shape
    if block == (n, k):
        found: Any = granularity.PerTensor()
    elif block[0] == 1:
        found = granularity.PerRow() if block[1] == k else granularity.PerGroup(block[1])
    else:
        return None
    if of == "Float8Tensor":
        return {"granularity": found, "float8_dtype": tensor.qdata.dtype, "act_quant_kwargs": tensor.act_quant_kwargs}
    mapping: Any = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    kind = mapping.SYMMETRIC if tensor.zero_point is None else mapping.ASYMMETRIC
    return {"granularity": found, "mapping_type": kind, "act_quant_kwargs": tensor.act_quant_kwargs}


class TorchaoWeight(_Torchao, CodedWeight):  # type: ignore[misc, override]
    """Int8Tensor, whose bytes are shared, Int4Tensor and IntxUnpackedToInt8Tensor: weights only."""

    names = _Torchao.names

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        weight: Any = getattr(module, "weight", None)
        if not super().accepts(module) or type(weight).__name__ not in _CODED:
            return False
        # activations that are quantised as well, or scaled first, are the module's own arithmetic
        others = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")
        return all(getattr(weight, name, None) is None for name in others)

    def lying(self) -> list[Tensor]:
        weight = self.module.weight
        return [t for name in _LYING if (t := getattr(weight, name, None)) is not None]

    def view(self) -> QuantWeight:
        return from_torchao(self.module.weight)


class TorchaoDecodedWeight(_Torchao, DecodedWeight):
    """Float8Tensor, AffineQuantizedTensor of older versions, tensors that quantise activations, and others."""

    names = _Torchao.names

    def decoded(self) -> Tensor:
        w: Tensor = self.module.weight.dequantize()
        return w.to(torch.float32)
