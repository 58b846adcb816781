"""Subjects of measurement: the same random weights as our layers, as bitsandbytes', as PEFT's, and dense.

Copies hold equal numbers in memory of their own (see measure.py). Nothing here is timed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, quantize_4bit

from .bnb import use_kernel

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}


def quant_copies(
    n: int, k: int, count: int, nested: bool = True, quant_type: str = "nf4", device: str = "cpu"
) -> list[QuantWeight]:
    """`count` copies of one random 4-bit weight [n, k]."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    return copies_of(quantize_4bit(w, quant_type, nested=nested).to(device), count)


def copies_of(q: QuantWeight, count: int) -> list[QuantWeight]:
    """`count` copies of a weight in any format."""

    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.clone()

    return [
        replace(q, packed=q.packed.clone(), absmax=own(q.absmax), nested_absmax=own(q.nested_absmax))
        for _ in range(count)
    ]


def bnb_layer(q: QuantWeight, compute: torch.dtype) -> nn.Module:
    """bitsandbytes' Linear4bit over a copy of the bytes of `q`, as transformers would build it."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    use_kernel()
    n, k = q.shape
    code = get_4bit_type(q.quant_type, q.packed.device)
    inner = None
    if q.nested:
        inner = QuantState(absmax=q.nested_absmax.clone(), code=create_dynamic_map().to(q.packed.device),
                           blocksize=q.nested_blocksize, dtype=torch.float32)  # fmt: skip
    state = QuantState(absmax=q.absmax.clone(), shape=torch.Size((n, k)), code=code, blocksize=q.blocksize,
                       quant_type=q.quant_type, dtype=compute, offset=q.offset, state2=inner)  # fmt: skip
    # a tiny layer first: its own initialisation of a large weight would take longer than all that is measured
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=compute, quant_type=q.quant_type)
    layer.in_features, layer.out_features = k, n
    layer.weight = bnb.nn.Params4bit(
        q.packed.clone().view(-1, 1), requires_grad=False, quant_state=state, blocksize=q.blocksize,
        compress_statistics=q.nested, quant_type=q.quant_type, bnb_quantized=True, module=layer,
    )  # fmt: skip
    layer.quant_state = state
    return layer


def our_layer(q: QuantWeight) -> nn.Module:
    from fastpeft import NF4Linear

    return NF4Linear(q)


def dense_layer(q: QuantWeight, dtype: torch.dtype) -> nn.Module:
    from peft_kernels import dequantize_4bit

    n, k = q.shape
    with torch.device("meta"):
        layer = nn.Linear(k, n, bias=False)
    layer.weight = nn.Parameter(dequantize_4bit(q, dtype), requires_grad=False)
    return layer


def with_adapter(
    package: Any, layers: list[nn.Module], r: int, dropout: float, train: bool, **options: Any
) -> list[nn.Module]:
    """The layers with LoRA of rank r, by `package` (peft, or fastpeft: one API), B not zero. options: more fields."""
    holder = nn.ModuleDict({f"n{i}": nn.ModuleDict({"lin": layer}) for i, layer in enumerate(layers)})
    config = package.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["lin"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package.inject_adapter_in_model(config, holder)
    g = torch.Generator().manual_seed(1)
    for name, p in holder.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    holder.train(train)
    return [holder[f"n{i}"]["lin"] for i in range(len(layers))]  # type: ignore[index]


def forward_call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def step_call(
    layer: nn.Module, x: Tensor, dy: Tensor, through: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], object]:
    """Forward and backward of a layer in the middle of a model: gradients of x, A, B (and DoRA's m). through: what
    computes it."""
    run = layer if through is None else through
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    if len(wanted) not in (3, 4):
        raise ValueError(f"expected A and B, or A, B and m to be trained, found {len(wanted) - 1} trained tensors")

    def call() -> object:
        return torch.autograd.grad(run(x), wanted, dy)

    return call


def clone_states(layers: list[nn.Module]) -> list[nn.Module]:
    """Deep copies, for a second mode of layers that change themselves (bitsandbytes repacks in eval mode)."""
    return [copy.deepcopy(layer) for layer in layers]
