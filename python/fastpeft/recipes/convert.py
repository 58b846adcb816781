"""Any adapter with a merged form as a LoRA: for servers that know LoRA alone, mixed batches, merging with LoRAs.

Each layer's update, merged weight less base weight, is cut to the wanted rank by its singular values, which no matrix
of that rank approximates better. A method that knows thin factors of its update (`Method.factors`) needs no
decomposition of anything of the weight's size, and loses nothing where their rank suffices. What the adapter adds to
biases becomes LoRA's bias (`lora_bias`).
"""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..config.targets import minimal_suffixes
from ..config.types import PeftType, warn
from ..files.checks import PREFIX
from ..files.progress import shown
from ..inject.modules import adapter_layers, adapter_modules, walk
from ..inject.tokens import TrainableTokensWrapper
from ..layer.layer import AdapterLayer
from ..layer.saved_modules import ModulesToSaveWrapper
from ..methods.lora.lora import LoraConfig
from ..model.merge_math import svd_of_product
from ..saving.folder import save_adapter
from ..weights.base import widened

Converted = tuple[Tensor, Tensor, "Tensor | None"]  # A, B, and what is added to the bias


def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default", progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:  # fmt: skip
    """A LoRA that does what an adapter does, as near as its rank allows: its configuration, and tensors by file key.

    rank: of every layer (int), or the share of the squared singular values that each layer has to keep (float in
    (0, 1]), which gives each layer a rank of its own. A layer whose update is known to have a lower rank gets that one.
    compile_kwargs: compile the work on one layer with these arguments of `torch.compile`. Layers' scaling is one.

    Raises TypeError where a layer's adapter has no such form, and ValueError for a rank that makes no sense.
    """
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"Passing a rank of {rank} doesn't make sense, please pass a valid value.")
    layers = _layers(model, adapter_name)
    source = getattr(model, "peft_config", {}).get(adapter_name)
    if source is not None and source.peft_type == PeftType.LORA:
        warn("Converting a PEFT adapter to LoRA that is already a LoRA adapter.")
    bias = getattr(source, "bias", "none")
    if bias != "none":
        raise ValueError(f"The adapter's config sets bias={bias}: biases of the base model are no part of a LoRA.")
    work: Any = _convert if compile_kwargs is None else torch.compile(_convert, **compile_kwargs)
    bar = shown(layers.items(), "Converting to LoRA", progressbar)
    found = {name: work(layer, adapter_name, rank) for name, layer in bar}
    config = _config(model, source, rank, {name: len(a) for name, (a, _, _) in found.items()})
    config.lora_bias = any(added is not None for _, _, added in found.values())
    state: dict[str, Tensor] = {}
    for name, (a, b, added) in found.items():
        if layers[name].info.kind == "embedding":
            state |= {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
            continue
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if config.lora_bias:
            state[f"{name}.lora_B.bias"] = b.new_zeros(len(b)) if added is None else added
    for name, module in adapter_modules(model):
        if isinstance(module, ModulesToSaveWrapper):
            state |= {f"{name}.{key}": tensor.detach() for _, key, tensor in module.adapter_state(adapter_name)}
    tokens: dict[str, list[int]] = {}
    for name, layer in adapter_layers(model, adapter_name):
        if name not in layers:  # rows that a LoRA trains beside it
            rows = {f"{name}.{key}": tensor.detach() for _, key, tensor in layer.adapter_state(adapter_name)}
            state |= rows
            if rows:
                end = name.removeprefix(PREFIX).removesuffix(".token_adapter")
                tokens[end] = list(layer.token_indices[adapter_name])
    if source is None:
        config.trainable_token_indices = tokens or None
    return config, state


def save_as_lora(
    path: str | os.PathLike[str], model: nn.Module, rank: int | float, adapter_name: str = "default",
    progressbar: bool = False, compile_kwargs: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the LoRA of `convert_to_lora` as an adapter folder."""
    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    save_adapter(path, state, config.to_dict())


def _layers(model: nn.Module, adapter: str) -> dict[str, AdapterLayer]:
    """The layers with the adapter, by name, if all of them can be converted; without those of rows beside it."""
    tokens = {s.module.token_adapter for s in walk(model) if isinstance(s.module, TrainableTokensWrapper)}
    layers = {name: layer for name, layer in adapter_layers(model, adapter) if layer not in tokens}
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    reasons = {}
    for name, layer in layers.items():
        if reason := layer.no_lora_form(adapter):
            reasons[reason] = name
    if reasons:
        listed = "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {listed}.")
    return layers


@torch.no_grad()
def _convert(layer: AdapterLayer, adapter: str, rank: int | float) -> Converted:
    method, view, info = layer.methods[adapter], layer.view(adapter), layer.info
    dtype = next((t.dtype for _, _, t in layer.adapter_state(adapter) if t.is_floating_point()), info.dtype)
    base = layer.unmerged_weight()
    factors = None if layer.base_edits else method.factors(view, view, widened(base[0]))
    added = None
    if factors is not None:
        u, s, v = svd_of_product(*factors)
    else:
        w, b = layer.merged_weight([adapter], base)
        u, s, v = torch.linalg.svd((w - layer.original_weight()[0]).flatten(1), full_matrices=False)
        if b is not None and (base[1] is None or not torch.equal(b, base[1].to(b.dtype))):
            added = (b if base[1] is None else b - base[1]).to(dtype)
    energy = torch.cumsum(s.double() ** 2, 0)
    kept = rank if isinstance(rank, int) else int(torch.searchsorted(energy, rank * energy[-1])) + 1
    most = min(info.shape[0], math.prod(info.shape[1:]))
    if kept > most:
        raise ValueError(
            f"The chosen rank {kept} is larger than the weight shape ({most}), please choose a lower rank."
        )
    kept = min(kept, len(s))
    a, b_out = v[:kept], u[:, :kept] * s[:kept]
    a, b_out = a.reshape(kept, -1, *info.shape[2:]), b_out.reshape(-1, kept, *[1] * len(info.shape[2:]))
    return a.to(dtype).contiguous(), b_out.to(dtype).contiguous(), added


def _config(model: nn.Module, source: Any, rank: int | float, ranks: dict[str, int]) -> LoraConfig:
    """Of the converted layers, whose names start at `model`."""
    ranks = {name.removeprefix(PREFIX): r for name, r in ranks.items()}
    common = rank if isinstance(rank, int) else 1  # each layer then has a rank of its own, as in PEFT's files
    config = LoraConfig(r=common, lora_alpha=common)
    if source is not None:
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        for name in (*names, "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out"):
            setattr(config, name, copy.copy(getattr(source, name, getattr(config, name))))
        config.trainable_token_indices = copy.copy(getattr(source, "trainable_token_indices", None))
    else:
        config.target_modules = minimal_suffixes(ranks, [s.name.removeprefix(PREFIX) for s in walk(model) if s.name])
    for name, r in ranks.items():
        if r != common or isinstance(rank, float):
            # A pattern also matches the end of a name: where this name is one, it has to be the whole.
            pattern = f"^{name}" if any(other.endswith(f".{name}") for other in ranks) else name
            config.rank_pattern = {**(config.rank_pattern or {}), pattern: r}
            config.alpha_pattern = {**(config.alpha_pattern or {}), pattern: r}
    return config
