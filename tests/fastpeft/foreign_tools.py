"""Layers of other quantisers: stand-ins with the attributes that the packages' own have, over random codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # place j of a word holds column order[j] of 8


def named(package: str, name: str, *bases: type) -> type:
    """A class with the name and the package of another's."""
    return type(name, bases or (nn.Module,), {"__module__": package})


def words(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words of codes along a dimension, the lowest bits first."""
    per = 32 // bits
    spread = codes.movedim(dim, -1).long().reshape(*codes.movedim(dim, -1).shape[:-1], -1, per)
    if order is not None:
        spread = spread[..., list(order)]
    total = (spread << (torch.arange(per) * bits)).sum(-1)
    signed = torch.where(total >= 2**31, total - 2**32, total)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()


def _buffers(module: nn.Module, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)


def gptq(
    n: int = 32, k: int = 64, bits: int = 4, group: int = 32, act_order: bool = False, stored: int = 2,
    seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A layer as gptqmodel's Torch kernel keeps it."""
    g = torch.Generator().manual_seed(seed)
    base = named("gptqmodel.nn_modules.qlinear", "BaseQuantLinear")
    module: Any = named("gptqmodel.nn_modules.qlinear.torch", "TorchLinear", base)()
    codes = torch.randint(0, 2**bits, (k, n), generator=g)
    zeros = torch.randint(0, 2**bits - 1, (k // group, n), generator=g)
    index = torch.arange(k) // group
    index = index[torch.randperm(k, generator=g)] if act_order else index
    scales = (torch.rand(k // group, n, generator=g) * 0.01 + 0.01).half()
    _buffers(module, qweight=words(codes, bits, 0), qzeros=words(zeros, bits, 1), scales=scales,
             g_idx=index.to(torch.int32), bias=torch.randn(n, generator=g).half())  # fmt: skip
    module.bits, module.group_size, module.in_features, module.out_features = bits, group, k, n
    module.qzero_format = lambda: stored
    module.exact = (scales.double()[index] * (codes - (zeros + 2 - stored)[index])).t()
    return module  # type: ignore[no-any-return]


def awq(n: int = 32, k: int = 64, group: int = 32) -> nn.Module:
    """A layer as AutoAWQ keeps it."""
    g = torch.Generator().manual_seed(1)
    module: Any = named("awq.modules.linear.gemm", "WQLinear_GEMM")()
    codes, zeros = (torch.randint(0, 16, size, generator=g) for size in ((k, n), (k // group, n)))
    scales = (torch.rand(k // group, n, generator=g) * 0.01 + 0.01).half()
    _buffers(module, qweight=words(codes, 4, 1, AWQ_ORDER), qzeros=words(zeros, 4, 1, AWQ_ORDER), scales=scales)
    module.bias = None
    module.w_bit, module.group_size, module.in_features, module.out_features = 4, group, k, n
    index = torch.arange(k) // group
    module.exact = (scales.double()[index] * (codes - zeros[index])).t()
    return module  # type: ignore[no-any-return]


class _Hqq(nn.Module):
    def to(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self  # as HQQ's own: its tensors stay

    def quantize(self, w: Tensor, weight_quant_params: dict[str, Any]) -> None:
        """Rounding to the least and the most of each group of columns."""
        bits, group = weight_quant_params["nbits"], weight_quant_params["group_size"]
        rows = w.float().reshape(-1, group)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        codes = ((rows - low) / scale).round().to(torch.uint8)
        half = len(codes) // 2
        self.W_q = nn.Parameter((codes[:half] << 4) | codes[half:] if bits == 4 else codes, requires_grad=False)
        self.meta = {"nbits": bits, "group_size": group, "shape": w.shape, "scale": scale, "zero": -low / scale,
                     "axis": 1, "packing": f"{bits}bit_u8", "view_as_float": False, "quant_scale": False,
                     "quant_zero": False, "compute_dtype": torch.float32}  # fmt: skip
        self.exact = ((codes.double() - self.meta["zero"].double()) * scale.double()).view(w.shape)


def hqq(bits: int = 4, n: int = 32, k: int = 64) -> nn.Module:
    """A layer with HQQLinear's attributes."""
    module: Any = named("hqq.core.quantize", "HQQLinear", _Hqq)()
    g = torch.Generator().manual_seed(2)
    module.quant_config = {"weight_quant_params": {"nbits": bits, "group_size": 32}}
    module.compute_dtype, module.bias = torch.float32, torch.randn(n, generator=g)
    module.quantize(torch.randn(n, k, generator=g), **module.quant_config)
    return module  # type: ignore[no-any-return]


def aqlm(turned: bool = False) -> nn.Module:
    """A layer with QuantizedLinear's parameters: two codebooks of 256 vectors of 8 elements."""
    g = torch.Generator().manual_seed(3)
    n, k = 32, 64
    module: Any = named("aqlm.inference", "QuantizedLinear")()
    codes = torch.randint(-128, 128, (n, k // 8, 2), generator=g).to(torch.int8)
    books, scales = torch.randn(2, 256, 1, 8, generator=g), torch.rand(n, 1, 1, 1, generator=g) + 0.5
    found = books.double()[torch.arange(2), codes.long() % 256].sum(2)  # [n, k / 8, 1, 8]
    module.exact = (found * scales.double()).reshape(n, k)
    if turned:
        codes = codes.transpose(0, 1).contiguous()
    for name, tensor in {"codes": codes, "codebooks": books, "scales": scales}.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    module.register_parameter("bias", None)
    module.in_features, module.out_features, module.gemv_op = k, n, object() if turned else None
    return module  # type: ignore[no-any-return]


class _Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.exact.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def eetq() -> nn.Module:
    """A layer with EetqLinear's attributes: `weight` is int8 [in, out] in an order that only its kernel knows."""
    g = torch.Generator().manual_seed(4)
    module: Any = named("eetq.modules.qlinear", "EetqLinear", _Own)()
    codes = torch.randint(-127, 128, (64, 32), generator=g).to(torch.int8)
    scales = torch.rand(32, generator=g) * 0.01 + 0.01
    module.exact = (codes.double() * scales.double()).t()
    _buffers(module, weight=codes.flip(0), weight_scales=scales, bias=torch.randn(32, generator=g))
    return module  # type: ignore[no-any-return]


def inc() -> nn.Module:
    """A layer with the attributes of Intel Neural Compressor's PatchedLinear."""
    g = torch.Generator().manual_seed(5)
    module: Any = named("neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules", "PatchedLinear",
                        _Own)()  # fmt: skip
    module.exact, module.in_features, module.out_features = torch.randn(32, 64, generator=g).double(), 64, 32
    module.weight = nn.Parameter(module.exact.float(), requires_grad=False)
    module.register_parameter("bias", None)
    return module  # type: ignore[no-any-return]


def te() -> nn.Module:
    """A layer with the attributes of Transformer Engine's Linear."""
    g = torch.Generator().manual_seed(6)
    module: Any = named("transformer_engine.pytorch.module.linear", "Linear", _Own)()
    module.exact, module.in_features, module.out_features = torch.randn(32, 64, generator=g).double(), 64, 32
    module.weight = nn.Parameter(module.exact.float(), requires_grad=False)
    module.bias = nn.Parameter(torch.randn(32, generator=g), requires_grad=False)
    return module  # type: ignore[no-any-return]


# By name: how it is made, PEFT's class of LoRA layers on it, the quantiser's name, whether our kernels read its codes
STAND_INS: dict[str, tuple[Callable[[], nn.Module], str, str, bool]] = {
    "gptq": (gptq, "GPTQLoraLinear", "gptq", True),
    "gptq-act-order": (lambda: gptq(act_order=True, stored=1), "GPTQLoraLinear", "gptq", True),
    "gptq-8bit": (lambda: gptq(bits=8), "GPTQLoraLinear", "gptq", True),
    "awq": (awq, "AwqLoraLinear", "awq", True),
    "hqq": (hqq, "HqqLoraLinear", "hqq", True),
    "hqq-8bit": (lambda: hqq(8), "HqqLoraLinear", "hqq", True),
    "aqlm": (aqlm, "AqlmLoraLinear", "aqlm", False),
    "aqlm-turned": (lambda: aqlm(True), "AqlmLoraLinear", "aqlm", False),
    "eetq": (eetq, "EetqLoraLinear", "eetq", False),
    "inc": (inc, "IncLoraLinear", "inc", False),
    "te": (te, "TeLinear", "te", False),
}
