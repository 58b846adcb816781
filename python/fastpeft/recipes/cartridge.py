"""Cartridges and other prefixes out of a cache that a model filled, and several cartridges as one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config.base import PeftConfig
from ..config.types import PeftType
from ..prompts.encoder import PROMPT
from ..saving.folder import load_adapter_file, save_adapter

_SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """A prefix [tokens, layers * 2 * width] of the first tokens of a cache.

    past_key_values: transformers' cache, or (keys, values) of each layer, [1, heads, tokens, width of a head]. Raises
    ValueError for several sequences, too few tokens, and layers that differ, TypeError for what is no cache.
    """
    pairs = list(_pairs(past_key_values))
    if not pairs:
        raise ValueError("Empty `past_key_values`.")
    first = pairs[0][0]
    if first.ndim != 4:
        raise ValueError(f"Expected key/value tensors with rank 4, got key.ndim={first.ndim}.")
    if first.shape[0] != 1:
        raise ValueError(
            "This helper expects `past_key_values` from a single-sequence prefill (batch=1). "
            f"Got batch={first.shape[0]}."
        )
    for tensor in (tensor for pair in pairs for tensor in pair):
        if tensor.shape[:2] != first.shape[:2]:
            raise ValueError("Inconsistent head shapes across layers in `past_key_values`.")
        if tensor.shape[3] != first.shape[3]:
            raise ValueError("Inconsistent head_dim across layers in `past_key_values`.")
        if tensor.shape[2] < num_virtual_tokens:
            raise ValueError(f"Need at least {num_virtual_tokens} cached tokens, got {tensor.shape[2]}.")
    laid = torch.stack([tensor[0, :, :num_virtual_tokens] for pair in pairs for tensor in pair])
    return laid.permute(2, 0, 1, 3).reshape(num_virtual_tokens, -1)  # of [2 * layers, heads, tokens, width]


def _pairs(cache: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if layers := getattr(cache, "layers", None):
        yield from ((layer.keys, layer.values) for layer in layers)
    elif hasattr(cache, "__iter__"):
        for layer in cache:
            if not isinstance(layer, (tuple, list)) or len(layer) < 2:
                raise TypeError(f"`past_key_values` should have (keys, values) of each layer, got {type(layer)}")
            yield layer[0], layer[1]
    else:
        raise TypeError(
            f"Unsupported `past_key_values` type {type(cache)}. Expected transformers' cache or (keys, values) of each "
            "layer."
        )


def _checked(model: Any, adapter_name: str | None) -> tuple[str, Any]:
    name = model.active_adapter if adapter_name is None else adapter_name
    config = model.peft_config[name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        kind = config.peft_type.value
        raise ValueError(f"Adapter '{name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {kind}).")
    if getattr(config, "prefix_projection", False):
        raise ValueError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`."
        )
    return name, config


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a prefix (the active one) start as the first tokens of a cache; returns it, [tokens, layers * 2 * width].

    Raises ValueError for an adapter that is no prefix, and as `prompt_embeddings_from_past_key_values`.
    """
    name, config = _checked(model, adapter_name)
    tokens = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    with torch.no_grad():
        prompt = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=tokens)
        model.prompt_encoder[name].load_prompt_embeddings(prompt)
    return prompt


def initialize_kv_prefix_from_text(
    model: Any, tokenizer: Any, *, text: str, adapter_name: str | None = None, num_virtual_tokens: int | None = None,
    use_chat_template: bool = True, max_length: int | None = None,
) -> Tensor:  # fmt: skip
    """Let a prefix start as the cache of a text that the base model reads, which needs that many tokens.

    use_chat_template: read it as the system's message, where the tokenizer has a template. max_length: of the text, in
    tokens.
    """
    name, _ = _checked(model, adapter_name)
    ids = None
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}], tokenize=True, add_generation_prompt=False, return_dict=False,
                return_tensors="pt",
            )  # fmt: skip
        except (TypeError, ValueError):  # it has no template
            ids = None
    if ids is None:
        cut = max_length is not None
        ids = tokenizer(text, return_tensors="pt", truncation=cut, max_length=max_length)["input_ids"]
    ids = ids[:, :max_length].to(next(model.parameters()).device)
    with torch.no_grad(), model.disable_adapter():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=output.past_key_values, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]], *, output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:  # fmt: skip
    """Write one cartridge of several, one after the other; of the frozen tokens it has the first one's.

    Raises ValueError for fewer than two, for what is no cartridge, and for cartridges of different models.
    safe_serialization: False writes `adapter_model.bin`, a pickle, with a warning.
    """
    if len(adapter_paths) < 2:
        raise ValueError("Need at least 2 adapters to compose.")
    loaded = [load_adapter_file(path) for path in adapter_paths]
    configs: list[Any] = [PeftConfig.from_dict(content) for content, _ in loaded]
    for path, config in zip(adapter_paths, configs, strict=True):
        if config.peft_type != PeftType.CARTRIDGE:
            kind = config.peft_type.value
            raise ValueError(f"Adapter at '{os.fspath(path)}' is not a CARTRIDGE adapter (got {kind}).")
        for name in _SAME:
            if getattr(config, name) != getattr(configs[0], name):
                raise ValueError(f"Incompatible CARTRIDGE configs for attribute '{name}'.")
    prompt = torch.cat([tensors[PROMPT] for _, tensors in loaded])
    config = replace(configs[0], num_virtual_tokens=len(prompt)).to_dict()
    save_adapter(output_path, {PROMPT: prompt}, config, safe_serialization=safe_serialization)
