"""transformers' continuous batching with an adapter and a sampling of its own for each request.

Theirs are the queue, the scheduler, the paged cache and the loop. Ours is what they have no place for: after a batch
was put together, `RowProcessor` writes the slot of each token and the sampling of each new token into tensors that keep
their places (CUDA graphs), and `RowRunner` picks the tokens by them.

Two switches are off. Prefix sharing takes equal tokens for equal keys and values, which is wrong as soon as two
requests have different adapters. Asynchronous batching prepares a step while another runs, and both would share these
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner

from . import attention
from .sampling import Sampling, draw, logprobs


@dataclass(frozen=True)
class Row:
    """A request's part of a batch. slot: of its adapter in the pool, -1 for the base."""

    slot: int
    sampling: Sampling


@dataclass
class Rows:
    """The rows of all requests, by request id, and what one batch needs of them.

    assign: called before each forward with the slots, int64 [tokens]; ended: with the ids of requests that are surely
    in no batch any more; stepped: with the numbers of requests and of tokens in the batch.
    """

    assign: Callable[[Tensor], None]
    ended: Callable[[list[str]], None]
    stepped: Callable[[int, int], None]
    by_id: dict[str, Row] = field(default_factory=dict)
    ending: SimpleQueue[str] = field(default_factory=SimpleQueue)
    head_takes_tokens: bool = False  # the output head has adapters, and has to see all tokens

    def allocate(self, tokens: int, requests: int, device: torch.device) -> None:
        self.slots = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        self.values = torch.zeros(3, requests, dtype=torch.float32, device=device)  # temperature, top_p, uniform

    def drain(self) -> list[str]:
        ids = []
        while not self.ending.empty():
            ids.append(self.ending.get_nowait())
        return ids

    def fill(self, batch: list[Any], tokens: int) -> None:
        """batch: transformers' requests in the order of their tokens; tokens: with padding."""
        slots: list[int] = []
        values: list[tuple[float, float, float]] = []
        for future in batch:
            row = self.by_id[future.state.request_id]
            slots += [row.slot] * future.query_length
            if future.has_new_token:
                sampling = row.sampling
                values.append((sampling.temperature, sampling.top_p, sampling.uniform()))
        self.stepped(len(batch), len(slots))
        self.slots[: len(slots)] = torch.tensor(slots)
        self.slots[len(slots) : tokens] = -1
        if values:
            self.values[:, : len(values)] = torch.tensor(values).t()
        self.assign(self.slots[:tokens])


class RowProcessor(ContinuousBatchProcessor):
    """Theirs, which fills in `rows` after it has put a batch together."""

    rows: Rows

    def prepare_next_batch(self) -> bool:
        # Requests are cancelled before they are put here, and cancellations take effect in the call below.
        ending = self.rows.drain()
        some = super().prepare_next_batch()
        if ending:
            self.rows.ended(ending)
        if some:
            ios: Any = self.inputs_and_outputs
            batch = ios.requests_in_batch
            self.rows.fill(batch, ios.num_q_tokens)
            if self.model_device.type == "cpu":
                queries = [future.query_length for future in batch]
                # the position is already behind this step's tokens: it is the number of keys
                keys = [future.state.position_offset for future in batch]
                attention.current.step = attention.plan(queries, keys)
        return some


class RowRunner(ModelRunner):
    """Theirs, with tokens picked by each request's sampling."""

    rows: Rows

    def supports_logits_to_keep(self, model: Any) -> bool:
        return not self.rows.head_takes_tokens and bool(super().supports_logits_to_keep(model))

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        logits = scores[0]
        n = logits.shape[0]
        tokens = draw(logits, *self.rows.values[:, :n])
        output_ids[0, :n].copy_(tokens)
        output_ids[1, :n].copy_(logprobs(logits, tokens).view(torch.int32))


class RowManager(ContinuousBatchingManager):
    """Theirs, with the two above, and on a CPU attention that does not mix requests."""

    def __init__(
        self, model: Any, generation_config: GenerationConfig, config: ContinuousBatchingConfig, rows: Rows
    ) -> None:
        self.rows = rows
        config.allow_block_sharing = False
        config.use_async_batching = False
        config.return_logprobs = True
        super().__init__(model, generation_config, config)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        if model.device.type == "cpu":
            self._original_attn_impl = model.config._attn_implementation
            model.set_attn_implementation(attention.register())
        else:
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        if not isinstance(processor, RowProcessor):
            processor.__class__ = RowProcessor  # theirs makes its own class, with thirteen arguments
            runner = processor.model_runner
            runner.__class__ = RowRunner
            processor.rows = runner.rows = self.rows  # type: ignore[attr-defined]
            requests = self.continuous_batching_config.max_requests_per_batch or processor.max_batch_tokens
            if self.model.device.type == "cpu":
                processor.cache.cache_tensor.zero_()  # takes its memory now, not page by page under load
            self.rows.allocate(processor.max_batch_tokens, requests, self.model.device)
        return processor
