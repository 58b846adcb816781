"""Saving an adapter that took something from the base weight as a plain LoRA of the original base, of twice its rank.

With what it took, P Q, the trained adapter is W - P Q + s B A = W + s [B, -P / s] [A; Q]. P Q is s B0 A0 with the
initial A0 and B0, which a folder holds that was saved before training; or the layers still know it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config.base import PeftConfig
from ..config.types import warn
from ..files.checks import PREFIX
from ..inject.modules import adapter_layers
from ..layer.layer import AdapterLayer
from .folder import load_adapter_file

PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


def as_plain_lora(
    tuner: Any, adapter: str, tensors: Mapping[str, Tensor], path: str | os.PathLike[str] | bool
) -> tuple[dict[str, Tensor], PeftConfig]:
    """The tensors (by file keys) and the configuration of the plain LoRA. path: the folder with the initial adapter;
    True, or for KaSA any: what the layers know."""
    config: Any = copy.deepcopy(tuner.peft_config[adapter])
    others = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters")
    if not hasattr(config, "init_lora_weights") or any(getattr(config, option, None) for option in others):
        raise ValueError(f"Adapter {adapter!r} cannot be saved as a plain LoRA of the original base.")
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported with "
            "use_rslora=True and a rank_pattern or alpha_pattern: scalings would change with the ranks."
        )
    known = path is True or config.kasa_config
    initial = None if known else load_adapter_file(path)[1]  # type: ignore[arg-type]
    result = dict(tensors)
    for name, layer in adapter_layers(tuner.model, adapter):
        _double(f"{PREFIX}{name}.", layer, adapter, result, initial)
    if any(layer.base.quantized and layer.base_edits for _, layer in tuner.adapter_layers()):
        warn(
            "The base is quantised, and quantising the rest of a weight is not the rest of the quantised weight: the "
            "converted adapter on the original base differs by these errors from the model that was trained.",
            2,
        )
    config.init_lora_weights = True
    config.loftq_config, config.kasa_config = {}, None
    config.eva_config = config.corda_config = config.lora_ga_config = None
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {key: 2 * r for key, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: 2 * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    return result, config


def _double(
    prefix: str, layer: AdapterLayer, adapter: str, tensors: dict[str, Tensor], initial: Mapping[str, Tensor] | None
) -> None:
    diagonal = tensors.pop(f"{prefix}lora_diag", None)
    for of_a, of_b in PAIRS.items():
        key_a, key_b = prefix + of_a, prefix + of_b
        if key_a not in tensors:
            continue
        a, b = tensors[key_a], tensors[key_b]
        b = b if diagonal is None else b * diagonal.to(b)
        if initial is None:
            p, q = _removed(layer, adapter, a, b)
            p = p / layer.scaling[adapter]
        elif initial.get(key_a, a).shape == a.shape and key_a in initial and key_b in initial:
            p, q = initial[key_b], initial[key_a]
        else:
            raise ValueError(f"the initial adapter lacks {key_a}, or has it with another shape")
        tensors[key_a], tensors[key_b] = torch.cat([a, q.to(a)]), torch.cat([b, -p.to(b)], dim=1)


def _removed(layer: AdapterLayer, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q of a layer's base edit; zeros where it has none."""
    if adapter not in layer.base_edits:
        return torch.zeros_like(b), torch.zeros_like(a)
    if (found := layer.removed_factors(adapter)) is None or found[1].shape != a.shape:
        raise ValueError(f"what adapter {adapter!r} took from the base weight is not of its rank")
    return found
