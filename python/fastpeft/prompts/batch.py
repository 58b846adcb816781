"""The prompts of a batch, whose rows may have different ones, or none: laid side by side, ending together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import key_values

Named = tuple[Any, Any, Any]  # a prompt's method, its encoder and its configuration


@dataclass(frozen=True)
class Prompts:
    """Prompts for the rows of a batch.

    embeds: vectors before the input [rows, tokens, width]. pairs: keys and values before it
    [layers, 2, rows, heads, tokens, width]. mask: which of the tokens of `pairs` and then of `embeds` a row has
    [rows, tokens], None for all. Where rows have fewer, theirs are the last.
    """

    embeds: Tensor | None
    pairs: Tensor | None
    mask: Tensor | None

    @property
    def before(self) -> int:
        """Tokens in the cache."""
        return 0 if self.pairs is None else self.pairs.shape[-2]

    @property
    def inserted(self) -> int:
        """Tokens before the input."""
        return 0 if self.embeds is None else self.embeds.shape[1]

    @property
    def tokens(self) -> int:
        return self.before + self.inserted


def prompts_of(
    named: Mapping[str, Named], rows: Sequence[str], task_ids: Tensor | None, like: Tensor, decoder: bool = False
) -> Prompts:
    """The prompts for the rows, whose names are those of `named` or of no prompt.

    task_ids: the task of each row, or one for all. like: its dtype and device are the prompts'. decoder: they are for
    the decoder of an encoder-decoder."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(rows):
        if name in named:
            groups.setdefault(name, []).append(i)
    embeds, pairs = {}, {}
    for name, found in groups.items():
        method, encoder, config = named[name]
        tasks = _tasks(task_ids, len(rows), found) if method.takes_tasks else None
        prompt = encoder.prompt(tasks).to(like.device, like.dtype)
        if method.in_cache:
            pairs[name] = key_values(prompt, config.num_layers, config.num_attention_heads, decoder)
        else:
            embeds[name] = prompt
    if len(groups) == 1 and len(next(iter(groups.values()))) == len(rows):
        (name,) = groups
        embed, pair = embeds.get(name), pairs.get(name)
        return Prompts(
            None if embed is None else embed.expand(len(rows), -1, -1),
            None if pair is None else pair.unsqueeze(2).expand(-1, -1, len(rows), -1, -1, -1),
            None,
        )
    before = max((p.shape[-2] for p in pairs.values()), default=0)
    inserted = max((p.shape[-2] for p in embeds.values()), default=0)
    mask = torch.zeros(len(rows), before + inserted, dtype=torch.bool, device=like.device)
    laid: Tensor | None = None
    for name, p in embeds.items():
        laid = p.new_zeros(len(rows), inserted, p.shape[-1]) if laid is None else laid
        laid = laid.index_copy(0, _index(groups[name], p), _padded(p, inserted).expand(len(groups[name]), -1, -1))
        mask[groups[name], before + inserted - p.shape[-2] :] = True
    put: Tensor | None = None
    for name, p in pairs.items():
        put = p.new_zeros(*p.shape[:2], len(rows), p.shape[-3], before, p.shape[-1]) if put is None else put
        each = _padded(p, before).unsqueeze(2).expand(-1, -1, len(groups[name]), -1, -1, -1)
        put = put.index_copy(2, _index(groups[name], p), each)
        mask[groups[name], before - p.shape[-2] : before] = True
    return Prompts(laid, put, mask)


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def _padded(prompt: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(prompt, (0, 0, tokens - prompt.shape[-2], 0))


def _tasks(task_ids: Tensor | None, rows: int, found: list[int]) -> Tensor | None:
    if task_ids is None or len(task_ids) != rows:  # one for all, or another number, which the encoder refuses
        return task_ids
    return task_ids[torch.tensor(found, device=task_ids.device)]
