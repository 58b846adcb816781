"""Our attention behind transformers' AttentionInterface: for modules that call it in a forward of their own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from peft_kernels import attention

from .attention import other_attention, scores_fit, torch_attention
from .description import Together
from .ways import ways_of

NAME = "fastpeft"  # of our attention in that interface


class Asking:
    """A model's configuration in which our attention is the chosen one."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:  # of what is not here
        return getattr(self._config, name)


def asking(self: Any, of: Together, x: Tensor) -> dict[str, Any]:
    """The configuration for `Given` with which the module finds our attention; none where it keeps its own."""
    if not of.interface or not ways_of(x).attention or x.dtype is torch.float64 or other_attention(self):
        return {}
    if torch.compiler.is_compiling():  # a graph sees torch's
        return {}
    _registered()
    return {"config": Asking(self.config)}


@functools.cache
def _registered() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q [B, H, T, D], k [B, G, S, D], v [B, G, S, Dv] -> (y [B, T, H, Dv], None), as transformers asks for it."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen, tokens = None, q.shape[2]
    # TODO-dropout
    if not dropout and not _trains(position_bias) and scores_fit(q.shape[:3].numel() * k.shape[2]):
        seen = module._fastpeft.shared.masks.seen(mask, tokens, causal)
    if seen is None:
        own: tuple[Tensor, Tensor | None] = torch_attention()(
            module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias,
            **kwargs,
        )  # fmt: skip
        return own
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(q, k, v, scale=scale, causal=seen.causal, spans=seen.spans, keep=seen.keep,
                     bias=position_bias), None  # fmt: skip


def _trains(bias: Tensor | None) -> bool:
    """True of a bias that wants a gradient, which kernels do not give: they keep no scores."""
    return bias is not None and bias.requires_grad and torch.is_grad_enabled()
