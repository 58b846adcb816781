"""aLoRA: a LoRA that acts from its invocation tokens on, so that the cache before them is the base model's
(arXiv 2504.12397).

A row's offset is the position of the last invocation counted from the end of the sequence; the model's forward finds it
in `input_ids`, or takes `alora_offsets` (a number or None for each row). A row without it is the base model's. In
`generate` the offsets are the prompt's: tokens that come later are after them, with a cache or without.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....config.types import PeftWarning, TaskType
from ...fused import Fused
from ...method import AdaptedLayer, Inner, LayerInfo
from ..lora import Lora
from . import variant


@variant("alora_invocation_tokens")
class Alora(Lora):
    mergeable = False
    forward_args = ("alora_offsets",)
    combined_by = "alora_invocation_tokens"
    examples: ClassVar[Any] = ({"r": 4, "alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},)

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        tokens = config.alora_invocation_tokens
        if not isinstance(tokens, (list, tuple)) or not all(type(token) is int for token in tokens):
            raise ValueError(f"alora_invocation_tokens should be a list of token ids, got {tokens!r}")
        if config.task_type != TaskType.CAUSAL_LM:
            warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", PeftWarning, stacklevel=2)

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        return "aLoRA has no merged form: it acts on the tokens from its invocation on"

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if s.get("lora_A") is None or s.lora_A.weight.dim() > 2:
            return None
        return s.lora_A.weight, s.lora_B.weight * s.scaling

    def row_values(self, config: Any, inputs: Mapping[str, Any]) -> Sequence[Any] | None:
        """(offset or None, length of the sequence that it was found in, if known) of each row."""
        given, ids = inputs.get("alora_offsets"), inputs.get("input_ids", inputs.get("inputs"))  # `generate` takes both
        if given is not None:
            return [(None if offset is None else int(offset), None) for offset in given]
        if not isinstance(ids, Tensor):
            text = "aLoRA finds its invocation in `input_ids` or `alora_offsets`: without them the base model answers."
            warnings.warn(text, PeftWarning, stacklevel=2)
            return None
        ids = ids[None] if ids.dim() == 1 else ids
        return [(offset, ids.shape[1]) for offset in offsets(ids, config.alora_invocation_tokens)]

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        a, b = s.lora_A, s.lora_B
        x = x.to(a.weight.dtype)
        length = x.shape[1] if x.dim() == 3 else 1
        rows: Sequence[tuple[Any, int | None]] = s.row_values or [(None, None)] * len(x)
        if len(rows) != len(x):
            raise ValueError(f"aLoRA has offsets for {len(rows)} rows, but a layer's input has {len(x)}.")
        if any(isinstance(offset, Tensor) for offset, _ in rows):  # in a graph, which cannot choose some tokens
            first = torch.stack([_start_in_graph(offset, whole, length) for offset, whole in rows]).to(x.device)
            acts = torch.arange(length, device=x.device) >= first[:, None]
            added = b(a(s.lora_dropout(x))) * s.scaling
            return y + torch.where(acts.view(*x.shape[:-1], 1), added, 0.0)
        starts = [_start(offset, whole, length) for offset, whole in rows]
        places = [r * length + t for r, start in enumerate(starts) for t in range(start, length)]
        chosen = torch.tensor(places, dtype=torch.long).to(x.device)
        # With no token chosen the gradients are zeros, not missing.
        added = b(a(s.lora_dropout(x.reshape(-1, x.shape[-1])[chosen]))) * s.scaling
        flat = y.to(added.dtype).reshape(-1, y.shape[-1]).index_add(0, chosen, added)
        return flat.view(y.shape)

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        return None


def offsets(ids: Tensor, tokens: Sequence[int]) -> list[Any]:
    """For each row of ids, how far before its end the last occurrence of `tokens` begins, or None; while a graph is
    traced that is a tensor, with 0 for None."""
    rows, length = ids.shape
    if length < len(tokens):
        return [None] * rows
    found = (ids.unfold(1, len(tokens), 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    steps = torch.arange(1, found.shape[1] + 1, device=ids.device)
    lasts = (found * steps).amax(1)
    if torch.compiler.is_compiling():
        return list(torch.where(lasts > 0, length - lasts + 1, 0).unbind())
    return [length - last + 1 if last else None for last in lasts.tolist()]


def _start_in_graph(offset: Any, whole: int | None, length: int) -> Tensor:
    """`_start` for an offset that is a tensor, 0 where there is none."""
    offset = torch.as_tensor(0 if offset is None else offset)
    end = whole if whole is not None and length >= whole else length
    return torch.where(offset > 0, (end - offset).clamp_min(0), length)


def _start(offset: int | None, whole: int | None, length: int) -> int:
    """The first position on which the adapter acts in a call with `length` tokens a row."""
    end = whole if whole is not None and length >= whole else length  # no cache where the sequence has grown since
    return length if offset is None else max(0, end - offset)
