"""Attention over transformers' paged cache on a CPU, request by request.

transformers packs all requests into one row and lets its CPU attention multiply every query with every key of the
batch, under a mask [tokens, all keys] that hides the other requests: with 32 requests of 60 tokens, 97 % of that work
is for nothing. Here tokens of requests that decode are one product per group of similar lengths, and the tokens of a
prompt one product per request. No mask is allocated.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..short_attention import short_attention

NAME = "fastpeft_paged"
_STEP = 16  # keys: oneDNN keeps a program for every shape that it meets, so that some shapes are better than all


@dataclass(frozen=True)
class Decoding:
    """Requests with one token each. rows: int64 [n], where their queries are. keys: int64 [n, longest], where their
    keys are; keep: bool [n, 1, 1, longest], which of those are theirs."""

    rows: Tensor
    keys: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Prompt:
    """A request with several tokens: `queries` and `keys` are its parts of the batch; keep: bool [queries, keys]."""

    queries: slice
    keys: slice
    keep: Tensor


@dataclass(frozen=True)
class Step:
    """The requests of one forward."""

    decoding: list[Decoding]
    prompts: list[Prompt]


class Current(threading.local):
    """The step that this thread computes; None outside of continuous batching, which has a thread of its own."""

    step: Step | None = None


current = Current()


def plan(query_lengths: list[int], key_lengths: list[int]) -> Step:
    """Plan of attention for requests that lie one behind the other with these numbers of queries and keys."""
    groups: dict[int, list[tuple[int, int, int]]] = {}
    prompts = []
    q = k = 0
    for queries, keys in zip(query_lengths, key_lengths, strict=True):
        if queries == 1:
            groups.setdefault(keys.bit_length(), []).append((q, k, keys))  # at most half of a group is padding
        else:
            seen = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
            prompts.append(Prompt(slice(q, q + queries), slice(k, k + keys), seen))
        q, k = q + queries, k + keys
    decoding = []
    for members in groups.values():
        rows, starts, lengths = (torch.tensor(column) for column in zip(*members, strict=True))
        places = torch.arange(-(-int(lengths.max()) // _STEP) * _STEP)
        keep = places < lengths[:, None]
        where = starts[:, None] + places.where(keep, 0)
        decoding.append(Decoding(rows, where, keep[:, None, None]))
    return Step(decoding, prompts)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, tokens, D], key and value [1, G, tokens, D]; [1, tokens, H, D] out.

    cache: what holds the keys and values of all tokens; since transformers 5.24 it has given them before this call.
    Raises ValueError outside of continuous batching.
    """
    step = current.step
    if step is None:
        raise ValueError(f"attention {NAME!r} serves continuous batching alone; set_attn_implementation('sdpa')")
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.empty_like(query[0].transpose(0, 1))  # [tokens, H, D]
    for part in step.prompts:
        q, k, v = query[:, :, part.queries], key[:, :, part.keys], value[:, :, part.keys]
        out[part.queries] = short_attention(q, k, v, part.keep, scale)[0].transpose(0, 1)
    for group in step.decoding:
        q = query[0].index_select(1, group.rows).transpose(0, 1).unsqueeze(2)  # [n, H, 1, D]
        k, v = (t[0].transpose(0, 1)[group.keys].transpose(1, 2) for t in (key, value))  # [n, G, longest, D]
        out[group.rows] = short_attention(q, k, v, group.keep, scale).squeeze(2)
    return out.unsqueeze(0), None


def register() -> str:
    """Make it known to transformers; its name. Without a mask function of that name, transformers makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)
    return NAME
