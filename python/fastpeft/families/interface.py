"""Our attention under a name in transformers' `AttentionInterface`, for modules whose forward stays their own code.

Such a forward makes q, k and v in its own way (DeepSeek's from latents, Gemma 4's from another layer) and asks its
configuration for an attention function. It is shown a configuration that names ours; the model's own is not touched.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from peft_kernels import attention

from .attention import adds_bools, scores_fit, why_not
from .description import Together
from .ways import ways_of

NAME = "fastpeft"


class Naming:
    """A module's configuration, which names our attention."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:  # of what is not here
        return getattr(self._config, name)


def asking(self: Any, of: Together, x: Tensor) -> dict[str, Any]:
    """The configuration for `Given` in which the module finds our attention; none where it keeps its own."""
    if not of.attends or not ways_of(x).attention or why_not(self, of, x.dtype) is not None:
        return {}
    if torch.compiler.is_compiling():  # a graph sees the modules
        return {}
    _register()
    return {"config": Naming(self.config)}


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Of transformers' interface: query [B, H, T, D], key [B, G, S, D], value [B, G, S, Dv] -> (y [B, T, H, Dv], None).

    A call that our operator does not serve goes to the function that the model's own configuration names.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen = None
    bools = adds_bools(module._fastpeft.part, module.config._config, attention_mask)
    if not bools and _serves(query, key, kwargs):
        seen = module._fastpeft.shared.masks.seen(attention_mask, query.shape[2], causal)
    if seen is None or seen.blind is not None:
        found: tuple[Tensor, Tensor | None] = _own(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return found
    q, (k, v) = query.transpose(1, 2), seen.up_to_now(query.shape[2], key.transpose(1, 2), value.transpose(1, 2))
    y = attention(
        q, k, v, scale=q.shape[-1] ** -0.5 if scaling is None else scaling, causal=seen.causal, spans=seen.spans,
        keep=seen.keep, bias=kwargs.get("position_bias"), softcap=kwargs.get("softcap") or 0.0,
        sinks=kwargs.get("s_aux"), dropout_p=dropout,
    )  # fmt: skip
    return y, None


def _serves(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> bool:
    if query.dtype is torch.float64 or kwargs.get("output_attentions"):
        return False
    if kwargs.get("cache") is not None:  # a cache of pages
        return False
    bias = kwargs.get("position_bias")
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():  # kernels keep no scores, so give it none
        return False
    return scores_fit(query.shape[:3].numel() * key.shape[2])


def _own(module: Any) -> Any:
    """The function that the module's own forward takes by its configuration."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state = module._fastpeft
    wanted = module.config._config._attn_implementation
    if wanted == "eager":
        return sys.modules[state.base.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[wanted]
