"""Prompts of adapters in transformers' paged cache: keys and values before those of a request.

A request with a prompt begins at the position behind it, as one does whose first tokens are in the cache. Its pages are
the scheduler's; what lies in those of the prompt is written here, before the forward of its first own tokens: a copy,
whatever else is in the batch. That holds too when the scheduler drops a request's pages and computes it anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from ...pool.prompts import Prompt


class RowScheduler(FIFOScheduler):
    """Theirs, in which a request begins behind its prompt. rows: as `batching.Rows`."""

    rows: Any

    def add_waiting_request(self, state: Any) -> None:
        row = self.rows.by_id.get(state.request_id)
        if row is not None and row.prompt is not None and not state.is_cpu_offloaded:
            state.position_offset = row.prompt.tokens
        super().add_waiting_request(state)


def write(cache: Any, request_id: str, prompt: Prompt, model: Any) -> None:
    """Put a prompt into the first pages of a request, for which the scheduler has allocated them."""
    if prompt.pairs is None:
        with _plain_attention(model):
            prompt.key_values(model)
    for layer, (keys, values) in enumerate(prompt.key_values(model)):
        allocator = cache.layer_to_allocator[layer]
        places = torch.tensor(allocator.get_write_indices(request_id, 0, prompt.tokens), device=keys.device)
        keys, values = (t.transpose(0, 1).to(allocator.cache_dtype) for t in (keys, values))  # [tokens, heads, width]
        allocator.update(keys, values, layer, places[:0], places)  # nothing to read


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """A model that this thread may call by itself: outside of a batch the attention of batches has no cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
