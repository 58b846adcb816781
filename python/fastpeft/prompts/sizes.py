"""Sizes of prompts: checked, and said by the model where they are left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config.base import PromptLearningConfig
from ..config.limits import MAX_RANK
from ..config.types import TaskType

MAX_WIDTH = 1 << 24
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
_CONTEXT = ("max_position_embeddings", "n_positions")


def check_sizes(config: Any) -> None:
    """ValueError for a prompt without a length, and for sizes that are none."""
    limits = {"num_virtual_tokens": MAX_RANK, "num_layers": MAX_RANK, "num_attention_heads": MAX_RANK,
              "token_dim": MAX_WIDTH, "encoder_hidden_size": MAX_WIDTH, "encoder_num_layers": 64}  # fmt: skip
    for name, most in limits.items():
        value = getattr(config, name, None)
        if value is None and name != "num_virtual_tokens":
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"`{name}` should be a positive integer of at most {most}, got {value!r}")
    if config.num_transformer_submodules not in (None, 1, 2):
        found = config.num_transformer_submodules
        raise ValueError(f"`num_transformer_submodules` should be 1, or 2 for an encoder and a decoder, got {found!r}")


def completed(config: Any, model: nn.Module, in_cache: bool) -> dict[str, Any]:
    """The fields that `config` leaves open, by name. in_cache: the prompt is keys and values, as wide as those are.

    Raises ValueError where the model does not say one, and for a prompt that is as long as the model's context.
    """
    own: Any = getattr(model, "config", None) or {}
    text = own.get_text_config() if hasattr(own, "get_text_config") else own
    fields = {
        "num_layers": config.num_layers or _first(own, _LAYERS) or _first(text, _LAYERS),
        "token_dim": config.token_dim or _first(text, _WIDTH),
        "num_attention_heads": config.num_attention_heads or _first(text, _HEADS),
    }
    for name, value in fields.items():
        if value is None:
            raise ValueError(f"Please specify `{name}` in `peft_config`")
    # as a dictionary: a model whose layers differ refuses to say it as one number
    content = text.to_dict() if hasattr(text, "to_dict") else text
    if in_cache and (heads := _get(content, "num_key_value_heads")) is not None:
        fields["num_attention_heads"], width = _key_values(content, heads, fields)
        fields["token_dim"] = fields["num_attention_heads"] * width
    if fields["token_dim"] % fields["num_attention_heads"] and in_cache:
        raise ValueError(
            f"`token_dim` ({fields['token_dim']}) must be divisible by `num_attention_heads` "
            f"({fields['num_attention_heads']})"
        )
    if getattr(config, "encoder_hidden_size", 1) is None:
        fields["encoder_hidden_size"] = fields["token_dim"]
    if config.num_transformer_submodules is None:
        fields["num_transformer_submodules"] = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    context = _first(text, _CONTEXT)
    if isinstance(context, int) and config.num_virtual_tokens >= context > 1:
        raise ValueError(
            f"`num_virtual_tokens` ({config.num_virtual_tokens}) leaves no room for an input: the context of the model "
            f"has {context} tokens. Use a shorter prompt."
        )
    return fields


def key_value_sizes(model: nn.Module) -> dict[str, int]:
    """The sizes of a model's keys and values, as a configuration names them: num_layers, num_attention_heads (of keys),
    token_dim (of all their heads together). Raises ValueError for a model that does not say them."""
    found = completed(PromptLearningConfig(num_virtual_tokens=1), model, in_cache=True)
    return {name: found[name] for name in ("num_layers", "num_attention_heads", "token_dim")}


def _key_values(content: Any, heads: int, fields: Mapping[str, Any]) -> tuple[int, int]:
    """(heads, width of a head) of keys and values; the widest, where layers differ (Gemma 4)."""
    width = _get(content, "head_dim") or fields["token_dim"] // fields["num_attention_heads"]
    if (most := _get(content, "global_head_dim")) is not None:
        return _get(content, "num_global_key_value_heads") or heads, most
    for layer in (_get(content, "per_layer_config") or {}).values():
        if layer.get("head_dim", width) > width:
            heads, width = layer.get("num_key_value_heads", heads), layer["head_dim"]
    return heads, width


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := _get(config, name)) is not None), None)
