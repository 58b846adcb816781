"""Of a model's weights those that are kept in 4 bits, and why some cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import quantize_4bit
from peft_kernels.formats import BLOCKSIZES, QUANT_TYPES

from ..files.checks import list_some
from ..files.safetensors import all_finite
from .bnb_keys import DTYPES
from .nf4_experts import dense_parameters, is_accelerated, why_not_packed
from .nf4_linear import NF4Linear

_PLAIN = ("FalconLinear", "FastHead")  # names of classes


def check_format(quant_type: str, blocksize: int) -> None:
    """Raise ValueError for a 4-bit format that there is not."""
    if quant_type not in QUANT_TYPES or blocksize not in BLOCKSIZES:
        expected = f"one of {list(QUANT_TYPES)} at one of {BLOCKSIZES}"
        raise ValueError(f"quantize_model: {quant_type!r} at blocksize {blocksize!r}, expected {expected}")


def skipped(model: nn.Module, skip: Iterable[str] | str) -> list[str]:
    """The names to pass over: those asked for, and those that transformers quantises in no format (T5 casts what goes
    into wo to the dtype of its weight)."""
    return [*([skip] if isinstance(skip, str) else skip), *(getattr(model, "_keep_in_fp32_modules", None) or ())]


def linear_layers(model: nn.Module, skip: list[str]) -> tuple[list[str], list[str]]:
    """The names of the layers to quantise, and of those that stay dense. Values are not looked at."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    names: list[str] = []
    kept: list[str] = []
    for name, layer in modules_of(model):
        if is_plain(layer) or is_conv1d(layer):
            weight: Any = layer.weight
            shared = uses[id(weight)] > 1
            (kept if shared or _is_in(name, skip) else names).append(name)
    return names, kept


def experts(model: nn.Module, skip: list[str]) -> list[tuple[str, str]]:
    """The modules of experts and their parameters to keep in 4 bits. ValueError where there are none."""
    found: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if _is_in(name, skip):
            continue
        if is_accelerated(module):
            raise ValueError(f"quantize_model: {name} is accelerated: call `unaccelerate(model)` first")
        found += [(name, parameter) for parameter in dense_parameters(module)]
    return found


def _is_in(name: str, skip: list[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in skip)


def check_layers(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError that names the layers whose values cannot be quantised."""
    bad = []
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(f"quantize_model: {name} is on the meta device; load its weights first")
        if not is_quantisable(weight.detach()):
            bad.append(name)
    if bad:
        raise ValueError(f"quantize_model: NaN, infinite or not float32/16 weights in {list_some(bad)}")


def check_experts(model: nn.Module, found: list[tuple[str, str]], blocksize: int) -> None:
    """Raise ValueError that names a parameter of experts that cannot be quantised."""
    for name, parameter in found:
        weight: Any = model.get_submodule(name)._parameters[parameter]
        path = f"{name}.{parameter}"
        if weight.is_meta:
            raise ValueError(f"quantize_model: {path} is on the meta device; load its weights first")
        if not is_quantisable(weight.detach()):
            raise ValueError(f"quantize_model: NaN, infinite or not float32/16 weights in {path}")
    check_blocks(model, found, blocksize)


def check_blocks(model: nn.Module, found: list[tuple[str, str]], blocksize: int) -> None:
    """Raise ValueError that names a parameter of experts whose size has no form in 4 bits. Values are not looked at."""
    for name, parameter in found:
        weight: Any = model.get_submodule(name)._parameters[parameter]
        why = why_not_packed(f"{name}.{parameter}", weight, blocksize)
        if why is not None:
            raise ValueError(f"quantize_model: {why}")


def is_quantisable(weight: Tensor) -> bool:
    """True of float32, float16 and bfloat16 without NaN and infinity."""
    return weight.dtype in DTYPES.values() and all_finite(weight)


def quantised(
    layer: Any, dense: Tensor, quant_type: str, blocksize: int, double_quant: bool, compute_dtype: torch.dtype | None
) -> NF4Linear:
    """A linear layer in 4 bits. dense: its weight, laid out as the layer's own; its bias is taken over."""
    turned = dense.t() if is_conv1d(layer) else dense
    weight = quantize_4bit(turned.contiguous(), quant_type, blocksize, double_quant)
    return NF4Linear(weight, layer.bias, compute_dtype).train(layer.training)


def is_plain(layer: nn.Module) -> bool:
    """True for nn.Linear itself, and for subclasses that compute the same product: Falcon's in transformers, and that
    of a head which `accelerate` made quicker."""
    return type(layer) is nn.Linear or (isinstance(layer, nn.Linear) and type(layer).__name__ in _PLAIN)


def is_conv1d(layer: nn.Module) -> bool:
    # By name, so that transformers need not be imported: GPT-2's linear layer, which stores [in, out].
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules below `model` by name, a shared one by each of its names."""
    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
