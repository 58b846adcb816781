"""Layers of GPTQ and AWQ, as gptqmodel, auto_gptq and AutoAWQ make them. No package is imported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.formats import from_awq, from_gptq

from .base import has_base
from .foreign import CodedWeight, OpaqueWeight, narrowed

# Kernels whose buffers stay in the files' layout; others shuffle them for a device once they are loaded.
_GPTQ = ("TorchLinear", "TorchQuantLinear", "TritonV2Linear", "TritonV2QuantLinear", "QuantLinear")
_AWQ = ("AwqTorchLinear", "AwqTorchQuantLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear", "WQLinear_GEMM")
_REFUSAL = "its codes were fitted to data by {}, and rounding anew would lose that (as in PEFT)"


def is_gptq(module: nn.Module) -> bool:
    """True for a layer with GPTQ's buffers."""
    return _is_of(module) and not is_awq(module)


def is_awq(module: nn.Module) -> bool:
    """True for a layer with AWQ's buffers."""
    if has_base(module, "AWQuantLinear", "gptqmodel"):
        return True
    of = type(module).__mro__
    return any(c.__name__.startswith("WQLinear") and c.__module__.split(".")[0] == "awq" for c in of)


def _is_of(module: nn.Module) -> bool:
    return has_base(module, "BaseQuantLinear", "gptqmodel") or has_base(module, "QuantLinear", "auto_gptq")


def _bits(module: nn.Module) -> int:
    return int(getattr(module, "bits", 0) or getattr(module, "w_bit", 0))


def _plain(module: nn.Module, kernels: tuple[str, ...], shape: tuple[int, int]) -> bool:
    """True for a kernel that keeps int32 `qweight` of this shape as it was loaded."""
    qweight = getattr(module, "qweight", None)
    return (
        type(module).__name__ in kernels and isinstance(qweight, Tensor) and qweight.dtype is torch.int32
        and tuple(qweight.shape) == shape and getattr(module, "adapter", None) is None
    )  # fmt: skip


class GptqWeight(CodedWeight):
    """GPTQ of 4 or 8 bits, with and without act-order: the codes are repacked once, in a copy of them."""

    label, quantized, refusal = "GPTQLoraLinear", "gptq", _REFUSAL.format("GPTQ")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        if not is_gptq(module) or _bits(module) not in (4, 8):
            return False
        n, k = module.out_features, module.in_features
        return _plain(module, _GPTQ, (int(k) * _bits(module) // 32, int(n)))  # type: ignore[arg-type]

    def lying(self) -> list[Tensor]:
        names = ("qweight", "qzeros", "scales", "g_idx")
        return [t for name in names if (t := getattr(self.module, name, None)) is not None]

    def view(self) -> QuantWeight:
        module = self.module
        # gptqmodel turns stored zeros into those of "gptq_v2" for some kernels, and says so
        stored = module.qzero_format() if hasattr(module, "qzero_format") else 1
        stored = 2 if getattr(module, "REQUIRES_FORMAT_V2", False) else stored
        index = getattr(module, "g_idx", None)
        index = None if index is None or not index.numel() else index
        return from_gptq(module.qweight, module.qzeros, narrowed(module.scales), index, _bits(module),
                         int(module.group_size), zero_offset=2 - int(stored))  # fmt: skip


class AwqWeight(CodedWeight):
    """AWQ of 4 bits in the layout of its GEMM kernel: the codes are repacked once, in a copy of them."""

    label, quantized, refusal = "AwqLoraLinear", "awq", _REFUSAL.format("AWQ")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        if not is_awq(module) or _bits(module) != 4:
            return False
        n, k = module.out_features, module.in_features
        return _plain(module, _AWQ, (int(k), int(n) // 8))  # type: ignore[arg-type]

    @property
    def computes_in(self) -> torch.dtype | None:
        return None  # gptqmodel's `compute_dtype` is that of W: x and adapters are not rounded to it

    def lying(self) -> list[Tensor]:
        return [self.module.qweight, self.module.qzeros, self.module.scales]

    def view(self) -> QuantWeight:
        module = self.module
        return from_awq(module.qweight, module.qzeros, narrowed(module.scales), int(module.group_size))


class GptqOpaqueWeight(OpaqueWeight):
    """GPTQ of other bits and of other kernels, and whatever else gptqmodel serves. W is gptqmodel's own decoding where
    the kernel leaves the codes as they were loaded."""

    label, quantized, refusal = "GPTQLoraLinear", "gptq", _REFUSAL.format("GPTQ")
    computes_in = None  # x goes to the layer's own forward as it comes

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return is_gptq(module)

    def decoded(self) -> Tensor:
        own = getattr(self.module, "dequantize_weight", None)
        if own is None or type(self.module).__name__ not in _GPTQ:
            return super().decoded()
        with torch.no_grad():
            w: Tensor = own()
        return w.t()

    @property
    def tensor(self) -> Tensor:
        found: Tensor = next(t for t in (*self.module.buffers(), *self.module.parameters()))
        return found

    @property
    def dtype(self) -> torch.dtype:
        scales = getattr(self.module, "scales", None)
        return scales.dtype if scales is not None and scales.is_floating_point() else torch.float32


class AwqOpaqueWeight(GptqOpaqueWeight):
    """AWQ of other kernels."""

    label, quantized, refusal = "AwqLoraLinear", "awq", _REFUSAL.format("AWQ")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return is_awq(module)
