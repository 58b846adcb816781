"""Turning a model's linear layers into `NF4Linear` and back.

`from_pretrained(folder, quantization_config=nf4_config())` quantises a dense folder while loading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import quantize_4bit
from peft_kernels.formats import BLOCKSIZES, QUANT_TYPES

from ..files.checks import list_some
from .base import has_base
from .bnb_keys import DTYPES
from .nf4_linear import NF4Linear
from .transformers_nf4 import make_classes, mark_quantized, unmark_quantized

Progress = Callable[[int, int, str], None]


def quantize_model(
    model: nn.Module,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Iterable[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` (and GPT-2's `Conv1D`) of `model`, in place, by an `NF4Linear`; returns the model.

    skip: module names, whole or as dotted parts (`lm_head`, `layers.0.mlp`). Layers whose weight is shared with another
    module (a tied output head) stay dense whatever `skip` says. progress(done, total, name) is called per layer.
    First everything is checked, so that a bad layer leaves the model as it was; then one layer at a time is
    quantised and its dense weight released. A transformers model also gets the `quantization_config` and the attributes
    that Trainer and `save_pretrained` look for. Raises ValueError for unknown types, block sizes and NaN weights.
    """
    if quant_type not in QUANT_TYPES or blocksize not in BLOCKSIZES:
        expected = f"one of {list(QUANT_TYPES)} at one of {BLOCKSIZES}"
        raise ValueError(f"quantize_model: {quant_type!r} at blocksize {blocksize!r}, expected {expected}")
    skip = [skip] if isinstance(skip, str) else list(skip)
    plan, kept = _plan(model, skip)
    if not plan:
        raise ValueError(f"quantize_model: no linear layer to quantise in {type(model).__name__} (skip={skip})")
    total, done = len(plan), 0
    while plan:
        name, parent, child = plan.popleft()
        layer: Any = parent._modules[child]
        dense = layer.weight.detach()
        dense = dense.t() if _is_conv1d(layer) else dense
        weight = quantize_4bit(dense.contiguous(), quant_type, blocksize, double_quant)
        new = NF4Linear(weight, layer.bias, compute_dtype).train(layer.training)
        parent._modules[child] = new
        del layer, dense
        done += 1
        if progress is not None:
            progress(done, total, name)
    mark_quantized(model, transformers_classes, quant_type, double_quant, compute_dtype, kept)
    return model


def _plan(model: nn.Module, skip: list[str]) -> tuple[deque[tuple[str, nn.Module, str]], list[str]]:
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    plan: deque[tuple[str, nn.Module, str]] = deque()
    kept: list[str] = []
    bad: list[str] = []
    for parent_name, parent in model.named_modules():
        for child, layer in parent.named_children():
            if not (type(layer) is nn.Linear or _is_conv1d(layer)):
                continue
            name = f"{parent_name}.{child}" if parent_name else child
            if owners[id(layer.weight)] > 1 or any(f".{part}." in f".{name}." for part in skip):
                kept.append(name)
                continue
            plan.append((name, parent, child))
            if layer.weight.is_meta:
                raise ValueError(f"quantize_model: {name} is on the meta device; load its weights first")
            if layer.weight.dtype not in DTYPES.values() or not _is_finite(layer.weight):
                bad.append(name)
    if bad:
        raise ValueError(f"quantize_model: NaN, infinite or not float32/16 weights in {list_some(bad)}")
    return plan, kept


def _is_finite(weight: Tensor) -> bool:
    # One pass and no mask; float64 holds the sum of any float32 values.
    return bool(torch.isfinite(weight.detach().sum(dtype=torch.float64)))


def _is_conv1d(layer: nn.Module) -> bool:
    # By name, so that transformers need not be imported: GPT-2's linear layer, which stores [in, out].
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `NF4Linear` by a dense `nn.Linear`, in place; returns the model."""
    for parent, child, layer in _children(model):
        if isinstance(layer, NF4Linear):
            with torch.device("meta"):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.detach().to(dense.weight.dtype), requires_grad=False)
            parent._modules[child] = dense.train(layer.training)
    unmark_quantized(model)
    return model


def from_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace every bitsandbytes `Linear4bit` of `model`, in place, by an `NF4Linear` over the same bytes."""
    for parent, child, layer in _children(model):
        if has_base(layer, "Linear4bit", "bitsandbytes"):
            parent._modules[child] = NF4Linear.from_bnb(layer).train(layer.training)
    return model


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]


def transformers_classes() -> tuple[type, type]:
    """transformers' configuration and quantizer of such models."""
    return make_classes(__name__, quantize_model, dequantize_model)


def nf4_config(**arguments: Any) -> Any:
    """A `quantization_config` for `from_pretrained`, with `quantize_model`'s arguments."""
    return transformers_classes()[0](**arguments)


def __getattr__(name: str) -> Any:  # a pickle of a quantised model looks them up
    if name in ("NF4Config", "NF4Quantizer"):
        return transformers_classes()[name == "NF4Quantizer"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
