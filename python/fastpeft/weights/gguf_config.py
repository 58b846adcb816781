"""transformers' configuration of a GGUF file: its own table of keys, and those that it has no line for.

Only keys are handed to transformers, in a small file: its reader would read every token of a vocabulary, for seconds.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..files.gguf_file import GGUFFile, read_gguf
from ..files.gguf_write import GGUFPart, GGUFValue, write_gguf_file

# Architectures of GGUF files that are read as they lie, each held to a model of transformers by the tests, and its
# families there.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "mistral", "mixtral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen2moe": ("qwen2_moe",),
    "qwen3moe": ("qwen3_moe",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3_text",),
    "phi3": ("phi3",),
    "gpt2": ("gpt2",),
    "falcon": ("falcon",),
    "stablelm": ("stablelm",),
    "starcoder2": ("starcoder2",),
    "nemotron": ("nemotron",),
}
_FIELDS = {
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "context_length": "n_positions",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
}
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose q llama.cpp scales otherwise
FACTORS = "rope_freqs.weight"  # what llama.cpp divides the frequencies of Llama 3 by
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # the same of Phi 3, for two lengths
ROTATIONS = (FACTORS, _LONG, _SHORT)


def gguf_config(path: str | os.PathLike[str] | GGUFFile) -> Any:
    """transformers' configuration of a GGUF file; no tensor is read.

    Raises AdapterFileError for an architecture that is not read as it lies, in words that name those which are, and for
    a setting that transformers' model does not have; GGUFPackageError without the package gguf.
    """
    file = path if isinstance(path, GGUFFile) else read_gguf(path)
    architecture = file.values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise file.wrong(f"its architecture is {str(architecture)[:80]!r}, and those read as they lie are {known}: "
                         "quantize=nf4 converts others that transformers reads")  # fmt: skip
    try:
        config = _by_transformers(file, architecture)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise file.wrong(f"transformers cannot read its configuration: {' '.join(str(error).split())[:200]}") from error
    keys = {key.removeprefix(f"{architecture}."): value for key, value in file.values.items()}
    if architecture == "llama" and keys.get("expert_count"):
        config = _mixtral(config, keys)
    for key, name in _FIELDS.items():
        if key in keys and name in vars(config):
            setattr(config, name, keys[key])
    if architecture in _LARGEST_GEMMA:
        heads = config.num_attention_heads
        largest = config.num_hidden_layers == _LARGEST_GEMMA[architecture]
        config.query_pre_attn_scalar = config.hidden_size // heads if largest else config.head_dim
    _rotations(file, keys, config)
    return config


def _by_transformers(file: GGUFFile, architecture: str) -> Any:
    import transformers

    values = {key: _typed(value) for key, value in file.values.items() if key != "general.architecture"}
    size = f"{architecture}.vocab_size"
    if size not in values and file.tokens is not None:
        values[size] = GGUFValue(file.tokens, "UINT32")
    # transformers looks at names: a head of its own, biases
    named = {name: GGUFPart("F32", (1,), lambda: np.zeros(1, np.float32)) for name in file.tensors}
    with tempfile.TemporaryDirectory() as folder:
        write_gguf_file(Path(folder) / "x.gguf", architecture, values, named)
        config: Any = transformers.AutoConfig.from_pretrained(folder, gguf_file="x.gguf")
    if size in values:
        config.vocab_size = values[size].value
    return config


def _typed(value: Any) -> GGUFValue:
    if isinstance(value, list):
        inner = _typed(value[0]).type if value else "UINT32"
        return GGUFValue(value, "ARRAY", inner)
    types = {bool: "BOOL", float: "FLOAT64", str: "STRING"}
    return GGUFValue(value, types.get(type(value), "INT64"))


def _mixtral(config: Any, keys: Mapping[str, Any]) -> Any:
    import transformers

    known = vars(transformers.MixtralConfig())
    values = {k: v for k, v in config.to_dict().items()
              if k in known and k not in ("model_type", "architectures", "transformers_version")}  # fmt: skip
    return transformers.MixtralConfig(**values, num_local_experts=keys["expert_count"],
                                      num_experts_per_tok=keys.get("expert_used_count", 2))  # fmt: skip


def _rotations(file: GGUFFile, keys: Mapping[str, Any], config: Any) -> None:
    """Settings of what turns q and k: its base, how many columns of a head, and how positions are scaled."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    rope = rope.get("full_attention", rope)  # Gemma 3 has another for its windows
    if "rope.freq_base" in keys:
        rope["rope_theta"] = float(keys["rope.freq_base"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = keys.get("rope.dimension_count", head)
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = turned / head
    elif turned != head:
        raise file.wrong(f"it turns {turned} columns of {head} of a head, and transformers' {config.model_type} all")
    kind, factor = keys.get("rope.scaling.type", "none"), float(keys.get("rope.scaling.factor", 1.0))
    original = keys.get("rope.scaling.original_context_length")
    if _LONG in file.tensors:
        rope.update(rope_type="longrope", long_factor=_floats(file, _LONG), short_factor=_floats(file, _SHORT),
                    original_max_position_embeddings=original)  # fmt: skip
        if (strength := keys.get("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = float(strength)
        config.original_max_position_embeddings = original
    elif kind == "linear" and factor != 1.0:
        rope.update(rope_type="linear", factor=factor)
    elif kind == "yarn" and factor != 1.0:
        strength = (1 + 0.1 * math.log(factor)) * keys.get("rope.scaling.attn_factor", 1.0)
        rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=original,
                    attention_factor=strength)  # fmt: skip
    elif kind not in ("none", "linear", "yarn"):
        raise file.wrong(f"its positions are scaled by {str(kind)[:40]!r}, which is not read")


def _floats(file: GGUFFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise file.wrong(f"it has no tensor {name}")
    return [float(v) for v in file.dense(name)]


def turn_frequencies(file: GGUFFile, model: nn.Module) -> None:
    """Divide a model's frequencies by the factors in its file, where it has some (Llama 3), as llama.cpp does."""
    if FACTORS not in file.tensors:
        return
    factors = torch.tensor(_floats(file, FACTORS))
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            own = module._buffers.get(name)
            if own is not None and own.shape != factors.shape:
                raise file.wrong(f"{FACTORS} has {len(factors)} values, and {len(own)} frequencies are turned")
            if own is not None:
                module._buffers[name] = own / factors.to(own)
