"""transformers' continuous batching with an adapter and a sampling of its own for each request.

Theirs are the queue, the scheduler, the paged cache and the loop. Ours is what they have no place for: after a batch
was put together, `RowProcessor` writes the slot of each token and the sampling of each new token into tensors that keep
their places (CUDA graphs), and `RowRunner` picks the tokens by them.

Two switches are off. Prefix sharing takes equal tokens for equal keys and values, which is wrong as soon as two
requests have different adapters. Asynchronous batching prepares a step while another runs, and both would share these
tensors.
"""

from __future__ import annotations

import logging
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
from transformers.generation.continuous_batching.utils import stream_context

from ...pool.prompts import Prompt
from . import attention, prefixes
from .errors import Told, told
from .sampling import Sampling, draw, logprobs

logger = logging.getLogger("fastpeft.apps.serve")


@dataclass
class Row:
    """A request's part of a batch. slot: of its adapter in the pool, -1 for the base. prompt: an adapter's that stands
    before it. spared: a loop that ended by a defect has left it to the next one."""

    slot: int
    sampling: Sampling
    prompt: Prompt | None = None
    spared: bool = False
    _place: int = -1
    _number: float = 0.0

    def uniform(self, place: int) -> float:
        """The random number of the token at that place, however often it is computed."""
        if place != self._place:
            self._place, self._number = place, self.sampling.uniform()
        return self._number


@dataclass
class Rows:
    """The rows of all requests, by request id, and what one batch needs of them.

    assign: called before each forward with the slots, int64 [tokens], or None for the base alone; ended: with the ids
    of requests that are surely in no batch any more; stepped: with the numbers of requests and of tokens in the batch;
    stopped: when the loop's thread ends, for whatever reason.
    """

    assign: Callable[[Tensor | None], None]
    ended: Callable[[list[str]], None]
    stepped: Callable[[int, int], None]
    stopped: Callable[[], None]
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
                values.append((sampling.temperature, sampling.top_p, row.uniform(future.state.position_offset)))
        self.stepped(len(batch), len(slots))
        self.slots[: len(slots)] = torch.tensor(slots)
        self.slots[len(slots) : tokens] = -1
        if values:
            self.values[:, : len(values)] = torch.tensor(values).t()
        self.assign(self.slots[:tokens])


class RowProcessor(ContinuousBatchProcessor):
    """Theirs, which fills in `rows` before it computes a batch, and in which a request that cannot be computed fails
    alone."""

    rows: Rows

    def prepare_next_batch(self) -> bool:
        # A request is here before its cancellation, which takes effect in the call below.
        ending = self.rows.drain()
        for id in ending:
            self.scheduler.set_request_cancellation(id)
        try:
            return super().prepare_next_batch()
        except RuntimeError as error:
            if not self._too_long_for_the_cache(error):
                raise
            return False
        finally:
            if ending:
                self.rows.ended(ending)

    def _generation_step(self, model: Any) -> None:
        try:
            self._compute(model)
        except Exception as error:
            self._compute_each(model, error)

    def _compute_each(self, model: Any, error: Exception) -> None:
        """Compute the requests of a batch that raised one by one, which shows whose fault it was. Their tokens, random
        numbers, keys and values are those of the batch."""
        ios: Any = self.inputs_and_outputs
        batch, tokens = ios.requests_in_batch, ios.input_ids.tolist()
        logger.warning("a forward of %d requests raised %r: each is computed by itself", len(batch), error)
        padded, fast, read, width = self.model_runner.pad_inputs, ios.use_block_table, ios.max_kv_read, ios.num_q_tokens
        for future in batch:
            future.state.position_offset -= future.query_length
            future.state.tokens_to_process, tokens = tokens[: future.query_length], tokens[future.query_length :]
        for future in batch:
            try:
                ios.prepare_batch_tensors(
                    [future], self.logit_processor, fast, width if padded else future.query_length, read, padded
                )
                self._compute(model)
                self.update_batch()
            except Exception as own:
                self._fail(future.state, own)
        ios.requests_in_batch = []  # all are up to date

    def _compute(self, model: Any) -> None:
        ios: Any = self.inputs_and_outputs
        batch = ios.requests_in_batch
        self._put_prompts(model, batch)
        self.rows.fill(batch, ios.num_q_tokens)
        if self.model_device.type == "cpu":
            queries = [future.query_length for future in batch]
            # the position is already behind this step's tokens: it is the number of keys
            keys = [future.state.position_offset for future in batch]
            attention.current.step = attention.plan(queries, keys)
        super()._generation_step(model)

    @torch.no_grad()
    def _put_prompts(self, model: Any, batch: list[Any]) -> None:
        """Put prompts before the requests whose first tokens are in this batch."""
        for future in batch:
            prompt = self.rows.by_id[future.state.request_id].prompt
            # the position is already behind this step's tokens
            if prompt is not None and future.state.position_offset - future.query_length == prompt.tokens:
                if prompt.pairs is None:
                    self.rows.assign(None)
                with stream_context(self.inputs_and_outputs.compute_stream):
                    prefixes.write(self.cache, future.state.request_id, prompt, model)

    def _fail(self, state: Any, error: Exception) -> None:
        logger.warning("request %s cannot be computed", state.request_id, exc_info=error)
        self._handle_request_error(error, state)
        if self.scheduler.waiting_requests.pop(state.request_id, None) is not None:
            self.scheduler.waiting_requests_order.remove(state.request_id)
        self.scheduler.finish_request(state.request_id)

    def _handle_request_error(self, error: Exception, state: Any) -> None:
        super()._handle_request_error(RuntimeError(told(error)), state)  # whose text goes to the client

    def _too_long_for_the_cache(self, error: RuntimeError) -> bool:
        """Fail the request that even an empty cache does not hold, whom the scheduler raises for; False for others."""
        if "No requests can be scheduled" not in str(error):
            return False
        scheduler = self.scheduler
        stuck = [state for state, _ in scheduler.starved_requests] or list(scheduler.waiting_requests.values())
        if stuck:
            self._fail(stuck[0], Told("its tokens do not fit into the key-value cache"))
        return bool(stuck)

    def take_waiting(self) -> list[Any]:
        """The requests that have not begun and that no loop has spared yet, out of its queues."""
        scheduler, queue = self.scheduler, self.input_queue
        assert queue is not None
        while not queue.empty():
            scheduler.add_waiting_request(queue.get_nowait())
        taken = []
        for id in list(scheduler.waiting_requests_order):
            row = self.rows.by_id.get(id)
            if row is not None and not row.spared and not scheduler.waiting_requests[id].is_cpu_offloaded:
                row.spared = True
                scheduler.waiting_requests_order.remove(id)
                taken.append(scheduler.waiting_requests.pop(id))
        return taken


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
    """Theirs, with the two above, and on a CPU attention that does not mix requests.

    Their loop ends with an exception that is no request's (a defect), and all requests with it. Here those that have
    not begun wait for the next loop, once.
    """

    def __init__(
        self, model: Any, generation_config: GenerationConfig, config: ContinuousBatchingConfig, rows: Rows
    ) -> None:
        self.rows = rows
        config.allow_block_sharing = False
        config.use_async_batching = False
        config.return_logprobs = True
        config.scheduler_type = "fifo"
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
            scheduler: Any = processor.scheduler
            scheduler.__class__ = prefixes.RowScheduler
            processor.rows = runner.rows = scheduler.rows = self.rows  # type: ignore[attr-defined]
            requests = self.continuous_batching_config.max_requests_per_batch or processor.max_batch_tokens
            if self.model.device.type == "cpu":
                processor.cache.cache_tensor.zero_()  # takes its memory now, not page by page under load
            self.rows.allocate(processor.max_batch_tokens, requests, self.model.device)
        return processor

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        except BaseException as error:  # theirs catches Exception, and would leave its requests without an answer
            logger.error("the engine's loop was ended", exc_info=error)
            self._handle_critical_error(Told(f"the loop was ended by {type(error).__name__}"), self.batch_processor)
        finally:
            self.rows.stopped()

    def _handle_critical_error(self, error: Exception, batch_processor: ContinuousBatchProcessor | None) -> None:
        waiting = batch_processor.take_waiting() if isinstance(batch_processor, RowProcessor) else []
        super()._handle_critical_error(error, batch_processor)
        for state in waiting:
            self.input_queue.put(state)
