"""Hot-swapping: the values of one LoRA adapter in place of another's, in the same tensors where they fit.

A compiled model goes on without recompilation if `prepare_model_for_compiled_hotswap` was called before it was
compiled: scalings become tensors and factors get the rank of the largest adapter, with zeros behind an adapter's own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.base import PeftConfig
from ..config.patterns import first_match
from ..config.types import PeftType
from ..inject.modules import adapter_layers, check_whole, iter_adapter_tensors
from ..methods.lora.lora import LoraConfig, scaling_of
from .folder import open_adapter

# Fields that must be the same in both adapters; ranks and scalings are swapped too.
CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
_FACTORS = (("lora_A", 0), ("lora_B", 1), ("lora_embedding_A", 0), ("lora_embedding_B", 1))  # with the rank's dimension


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError unless tensors, ranks and scalings are all that differs between two adapters' outputs."""
    type0, type1 = (str(getattr(c.peft_type, "value", c.peft_type)) for c in (config0, config1))
    if type0 != type1:
        raise ValueError(f"Incompatible PEFT types found: {type0} and {type1}")
    if type0 not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(f"Hotswapping only supports {', '.join(CONFIG_KEYS_TO_CHECK)} but {type0} was passed.")
    for key in CONFIG_KEYS_TO_CHECK[PeftType(type0)]:
        if (ours := getattr(config0, key)) != (theirs := getattr(config1, key)):
            raise ValueError(f"Configs are incompatible: for {key}, {ours} != {theirs}")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | os.PathLike[str], adapter_name: str, torch_device: str | None = None,
    **kwargs: Any,
) -> None:  # fmt: skip
    """Put the values of an adapter file into the adapter `adapter_name`, which keeps its name.

    Everything is checked first. torch_device: ignored; an adapter lives where its layers do. kwargs: of reading the
    file (subfolder, revision, token ...). Raises ValueError if the configurations, RuntimeError if the tensors do not
    fit.
    """
    bare: Any = getattr(model, "_orig_mod", model)
    if adapter_name not in bare.peft_config:
        raise ValueError(f"Adapter {adapter_name!r} not found. There are: {', '.join(bare.peft_config)}.")
    source = open_adapter(model_name_or_path, **kwargs)
    config: Any = source.peft_config()
    check_hotswap_configs_compatible(bare.peft_config[adapter_name], config)
    keys = {file: memory for memory, file, _ in iter_adapter_tensors(bare, adapter_name)}
    named = (key.rpartition(".") for key in source.tensors if key not in keys)  # in errors: as it would be in memory
    keys |= {f"{layer}.{end}": f"{layer}.{adapter_name}.{end}" for layer, _, end in named}
    state = {keys[file]: value for file, value in source.read().items()}
    hotswap_adapter_from_state_dict(model, state, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:  # fmt: skip
    """The same from a state dict whose keys are those in memory, with the adapter's name.

    Layers that the new adapter lacks get zeros. A smaller rank is padded with zeros; a larger one replaces the tensors.
    parameter_prefix: accepted; the adapter's tensors are known. Raises ValueError while the adapter is merged, and
    RuntimeError, with nothing changed, for tensors that it has no place for.
    """
    bare = getattr(model, "_orig_mod", model)
    layers = dict(adapter_layers(bare, adapter_name))
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. "
            "Please unmerge the adapter first by calling `unmerge_adapter()`."
        )
    check_whole(layers.values(), "hotswap_adapter", "Load the adapter under another name and delete this one.")
    own = {memory: tensor for memory, _, tensor in iter_adapter_tensors(bare, adapter_name)}
    if unexpected := [key for key in state_dict if key not in own]:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    for key, value in state_dict.items():
        _check_shape(key, own[key], value)
    alphas, ranks = (first_match(p or {}, list(layers)) for p in (config.alpha_pattern, config.rank_pattern))
    with torch.no_grad():
        for key, tensor in own.items():
            if key not in state_dict:
                tensor.zero_()
        for name, layer in layers.items():
            keys = [key for key in state_dict if key.startswith(f"{name}.")]
            if not keys:
                continue
            r, alpha = ranks.get(name, config.r), alphas.get(name, config.lora_alpha)
            layer.r[adapter_name], layer.lora_alpha[adapter_name] = r, alpha
            scaling = scaling_of(alpha, r, config.use_rslora) * layer.info.times
            if isinstance(held := layer.scaling[adapter_name], Tensor):
                held.fill_(scaling)
            elif held != scaling:
                layer.scaling[adapter_name] = scaling
            for key in keys:
                _swap(own[key], state_dict[key], layer.info.groups if ".lora_A." in key else 1)
            layer.changed()


def _check_shape(key: str, old: Tensor, new: Tensor) -> None:
    different = [i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=False)) if a != b]
    rank = {name: dim for name, dim in _FACTORS if f".{name}." in key}
    if old.dim() != new.dim() or (different and different != list(rank.values())):
        raise RuntimeError(f"Incompatible shapes found for LoRA weights {key}: {old.shape} vs {new.shape}.")


def _swap(old: Tensor, new: Tensor, groups: int) -> None:
    """Copy values into a tensor of at least their rank; else the tensor becomes larger."""
    new = new.to(old.device, old.dtype)
    if any(a < b for a, b in zip(old.shape, new.shape, strict=True)):
        old.data = new.clone()
        return
    if old.shape != new.shape:
        old.zero_()
    # In a grouped convolution each group has its own part of the rank.
    parts = zip(old.chunk(groups), new.chunk(groups), strict=True) if groups > 1 else [(old, new)]
    for into, values in parts:
        into[tuple(slice(n) for n in values.shape)] = values


def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:  # fmt: skip
    """Make the scalings tensors and pad the factors to a rank, so that later swaps do not recompile the model.

    To be called after the first adapter was loaded and before the model is compiled. target_rank: the largest rank that
    will be swapped in. config: configurations whose rank becomes target_rank. check_compiled: what to do about a model
    that is compiled already. Raises ValueError then, and if the model has no LoRA.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
                "result in re-compilation, hurting performance. Call the function before compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            valid = "'error', 'warn', or 'ignore'"
            raise ValueError(
                f"check_compiled, check_compiles should be one of {valid}, got {check_compiled!r} instead."
            )
    layers = [m for _, m in adapter_layers(getattr(model, "_orig_mod", model)) if hasattr(m, "lora_A")]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    check_whole(layers, "prepare_model_for_compiled_hotswap", "Adapters there cannot be swapped.")
    if target_rank is not None:
        of_layers = [(layer.info.groups, getattr(layer, n, {}), dim) for layer in layers for n, dim in _FACTORS]
        factors = [(factor, dim, groups) for groups, held, dim in of_layers for factor in held.values()]
        for each in factors:
            _check_pad(*each, target_rank)
        for each in factors:
            _pad(*each, target_rank)
    for layer in layers:
        for name, value in layer.scaling.items():
            layer.scaling[name] = torch.as_tensor(value, dtype=torch.float32, device=layer.info.device)
        layer.changed()
    if target_rank is None or config is None:
        return
    for one in config.values() if isinstance(config, Mapping) else [config]:
        one.r = target_rank
        one.rank_pattern = dict.fromkeys(one.rank_pattern or {}, target_rank)


def _check_pad(factor: Any, dim: int, groups: int, target_rank: int) -> None:
    if target_rank % groups:
        raise ValueError(
            f"Trying to pad a {type(factor).__name__} LoRA adapter with groups={groups} to target rank {target_rank}, "
            f"but the target rank is not divisible by {groups}. Please choose a target rank that is divisible by "
            f"{groups}."
        )
    rank = getattr(factor, "weight", factor).shape[dim] * (groups if dim else 1)
    if rank > target_rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({rank}). "
            "This is not possible."
        )


def _pad(factor: Any, dim: int, groups: int, target_rank: int) -> None:
    weight = getattr(factor, "weight", factor)
    shape = list(weight.shape)
    shape[dim] = target_rank // (groups if dim else 1)
    padded = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        _swap(padded, weight.detach(), 1 if dim else groups)
    weight.data = padded
    for name in ("out_features", "out_channels") if dim == 0 else ("in_features", "in_channels"):
        if hasattr(factor, name):
            setattr(factor, name, target_rank)
