"""A prefix as transformers' cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.types import warn

LAYERS_DIFFER = ("gemma2", "gemma3_text", "gemma4")  # whose caches have layers of several kinds


def key_values(prefix: Tensor, layers: int, heads: int, decoder: bool) -> Tensor:
    """A view of a prefix [..., tokens, layers * 2 * width] as [layers, 2, ..., heads, tokens, width of a head].

    decoder: of an encoder-decoder, where PEFT lays keys and values out in another way: layer i has those of the places
    4 i and 4 i + 1, counted around."""
    wide = prefix.shape[-1]
    parts = prefix.view(*prefix.shape[:-1], 2 * layers, heads, wide // (2 * layers * heads)).movedim(-3, 0)
    parts = parts.transpose(-3, -2)  # [2 * layers, ..., heads, tokens, width]
    if decoder and layers > 1:
        parts = parts[[(4 * layer + part) % (2 * layers) for layer in range(layers) for part in (0, 1)]]
    return parts.unflatten(0, (layers, 2))  # type: ignore[no-any-return, no-untyped-call]


def filled_cache(pairs: Tensor, model: Any, into: Any = None) -> Any:
    """A cache that starts with a prefix's keys and values, [layers, 2, rows, heads, tokens, width].

    into: an empty cache to fill; by default a dynamic one, whose layers then hold views of `pairs`.
    Raises ValueError where no layer of the model has such keys.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    plain = not any(name in str(getattr(text, "model_type", "")) for name in LAYERS_DIFFER)
    cache = into if into is not None else DynamicCache() if plain else DynamicCache(config=text)
    own = getattr(cache, "self_attention_cache", cache)
    if into is None and plain:
        for keys, values in pairs:
            layer: Any = DynamicLayer()
            layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
            layer.is_initialized = True
            cache.layers.append(layer)
    else:
        _update(own, pairs, text)
    if getattr(model.config, "is_encoder_decoder", False) and cache is own:
        cache = EncoderDecoderCache(cache, DynamicCache())
    _to_layers(model, own)
    return cache


def computed_pairs(model: Any, vectors: Tensor) -> Tensor:
    """The keys and values that a decoder of transformers' computes for vectors before an input [tokens, width]:
    [layers, 2, heads, tokens, width of a head], without gradients."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    positions = torch.arange(len(vectors), device=vectors.device)[None]
    with torch.no_grad():
        model.get_decoder()(
            inputs_embeds=vectors[None], position_ids=positions, past_key_values=cache, use_cache=True
        )
    layers: list[Any] = cache.layers
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])


def _update(cache: Any, pairs: Tensor, text: Any) -> None:
    """Put keys and values into the layers whose own are not wider; those that read another layer's have none."""
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    first_shared = getattr(text, "num_hidden_layers", len(pairs)) - shared
    done: list[int] = []
    for i, (keys, values) in enumerate(pairs):
        heads, width = _of_layer(text, i) or (keys.shape[-3], keys.shape[-1])
        if (shared and i >= first_shared) or heads > keys.shape[-3] or width > keys.shape[-1]:
            continue
        cache.update(keys[..., :heads, :, :width], values[..., :heads, :, :width], i)
        done.append(i)
    if not done:
        raise ValueError(
            "Prefix tuning skipped every layer because no layer's KV shape matched the provisioned prefix "
            f"(num_attention_heads={pairs.shape[-3]}, head_dim={pairs.shape[-1]}). Override `token_dim` and "
            "`num_attention_heads` in `PrefixTuningConfig` to match a layer that should receive the prefix."
        )
    if skipped := [i for i in range(len(pairs)) if i not in done]:
        why = "due to KV shape mismatch or shared-KV layers."
        warn(f"Prefix tuning injected into layers {done}; skipped {skipped} {why}")


def _of_layer(text: Any, i: int) -> tuple[int, int] | None:
    """(heads, width) of a layer's keys, of models whose layers differ."""
    kinds: Sequence[str] = getattr(text, "layer_types", None) or ()
    if kinds and (each := getattr(text, "per_layer_config", None)) is not None:
        return each[i].num_key_value_heads, each[i].head_dim
    if not kinds or (whole := getattr(text, "global_head_dim", None)) is None:
        return None
    if kinds[i] == "sliding_attention":
        return text.num_key_value_heads, text.head_dim
    return getattr(text, "num_global_key_value_heads", None) or text.num_key_value_heads, whole


def _to_layers(model: Any, cache: Any) -> None:
    """Move what accelerate has laid on several devices."""
    places = getattr(model, "hf_device_map", None)
    if not places or len(set(map(str, places.values()))) < 2:
        return
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        weight = next(module.parameters(), None)
        if isinstance(index, int) and weight is not None and index < len(cache.layers) and name:
            layer = cache.layers[index]
            layer.keys, layer.values = layer.keys.to(weight.device), layer.values.to(weight.device)
