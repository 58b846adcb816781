"""Continuous batching for asyncio: requests come in with an adapter's name, tokens go out as they are made.

A request waits for its adapter (a thread reads the file, others go on), gets a lease on its slot, and joins the batch.
The lease ends when its last token is there, or, for a request that nobody waits for any more, when transformers' loop
has taken it out of the batch: a slot is never given away under a forward that reads it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from ...pool import AdapterLoadError, AdapterPool, Lease, PoolFull, UnknownAdapterError
from ...pool.prompts import Prompt
from .batching import Row, RowManager, Rows
from .errors import ApiError, bad, failed, late, not_finite, overloaded, shutting_down, unknown, unusable
from .limits import Limits
from .metrics import Metrics
from .sampling import Sampling

logger = logging.getLogger("fastpeft.apps.serve")

_LOADERS = 32  # threads that wait for an adapter's file or slot
_PATIENCE = 5.0  # seconds that a new request waits for a loop that ended to start again
_PAUSE, _LONGEST_PAUSE = 0.05, 10.0  # seconds before that, each time twice as long while loops live no longer


@dataclass(frozen=True)
class Token:
    """logprob: the natural logarithm of its probability by the model. end: "stop" (the model ended the answer; this
    token says so), "length" or None."""

    id: int
    logprob: float
    end: str | None


@dataclass
class _Open:
    """A request. given: how many of its tokens went to `tokens`, where an exception ends it, too."""

    id: str
    served_by: str
    began: float
    limit: int
    lease: Lease | None = None
    given: int = 0
    running: bool = False
    tokens: asyncio.Queue[Token | ApiError] = field(default_factory=asyncio.Queue)


class Engine:
    """model: transformers' causal language model, with `pool`'s layers in it if there is one. ends: the tokens that end
    an answer."""

    def __init__(self, model: Any, pool: AdapterPool | None, ends: list[int], limits: Limits, metrics: Metrics) -> None:
        self.model, self.pool, self.ends, self.limits, self.metrics = model, pool, ends, limits, metrics
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.draining = False
        self._ids = itertools.count()
        self._open: dict[str, _Open] = {}
        self._leaving: dict[str, Lease | None] = {}  # cancelled, until the loop has let go of them
        self._threads = ThreadPoolExecutor(_LOADERS, thread_name_prefix="fastpeft-acquire")
        self._pace = 1.0  # seconds that a request took lately
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started, self._pause = 0.0, _PAUSE
        self.rows = Rows(self._assign, self._ended, metrics.stepped, self._stopped)
        if pool is not None:
            head = model.get_output_embeddings()
            self.rows.head_takes_tokens = any(layer is head for layer in pool.layers.values())
        config = ContinuousBatchingConfig(
            page_size=limits.page,
            num_blocks=None if limits.cache_tokens is None else -(-limits.cache_tokens // limits.page),
            max_batch_tokens=limits.batch_tokens,
            max_requests_per_batch=min(limits.max_batch, limits.batch_tokens),
        )
        # Neutral on purpose: sampling is each request's own.
        neutral: Any = GenerationConfig
        generation = neutral(do_sample=False, eos_token_id=list(ends) or -1, pad_token_id=0)
        self.manager = RowManager(model, generation, config, self.rows)

    def start(self) -> None:
        self._loop, self._started = asyncio.get_running_loop(), time.monotonic()
        self.manager.start()

    def stop(self, seconds: float = 10.0) -> None:
        """End the loop; requests that are still open fail with 503. From another thread than the event loop's."""
        self.draining = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.manager.stop(block=True, timeout=seconds, hard_stop=True)
        self._on_loop(self._end_all)
        for lease in self._leaving.values():
            self._release(lease)
        self._leaving.clear()

    @property
    def alive(self) -> bool:
        return self.manager.is_running() and self.manager.background_thread_status.fatal_error is None

    @property
    def open(self) -> int:
        """Requests that were let in and are not answered, and cancelled ones that the loop still holds."""
        return len(self._open) + len(self._leaving)

    @property
    def waiting(self) -> int:
        """Of them, those that have no token yet."""
        return sum(request.given == 0 for request in self._open.values())

    # Requests

    def check(self, ids: list[int], max_tokens: int | None, prompt: Prompt | None = None) -> int:
        """The number of tokens a request may make, behind an adapter's prompt if there is one; ApiError for one that
        cannot be computed."""
        most, before = self.limits.max_length, 0 if prompt is None else prompt.tokens
        if not ids:
            raise bad("the prompt has no tokens", "prompt")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise bad(f"prompt: token ids must be from 0 to {self.vocabulary - 1}", "prompt")
        room = most - before - len(ids)
        if room < 1 or (max_tokens is not None and max_tokens > room):
            asked = "" if max_tokens is None else f" and max_tokens is {max_tokens}"
            asked += f" and the adapter puts {before} virtual tokens before it" if before else ""
            raise bad(f"the prompt has {len(ids)} tokens{asked}; together they may be at most {most}", "max_tokens",
                      "context_length_exceeded")  # fmt: skip
        return room if max_tokens is None else max_tokens

    def admit(self, served_by: str, limit: int) -> _Open:
        """Let a request in, or raise 429 or 503. Who gets it must `leave`."""
        if self.draining:
            raise shutting_down()
        if len(self._open) >= self.limits.max_batch + self.limits.max_queue:
            raise overloaded(len(self._open), self._patience())
        request = _Open(f"r{next(self._ids)}", served_by, time.monotonic(), limit)
        self._open[request.id] = request
        return request

    def _patience(self) -> int:
        rounds = 1 + len(self._open) / self.limits.max_batch
        return max(1, min(60, round(self._pace * rounds / 2)))

    async def begin(
        self, request: _Open, ids: list[int], adapter: str | None, sampling: Sampling, max_tokens: int | None = None
    ) -> None:
        """Get the adapter and join the batch. max_tokens: that were asked for. Raises ApiError."""
        lease = None
        if adapter is not None:
            lease = request.lease = await self._acquire(adapter, request)
        prompt = None if lease is None else lease.prompt
        if prompt is not None:
            request.limit = self.check(ids, max_tokens, prompt)
        slot = -1 if lease is None or prompt is not None else int(lease)
        self.rows.by_id[request.id] = Row(slot, sampling, prompt)
        self.manager.register_result_handler(request.id, lambda output: self._arrived(request, output))
        patience = time.monotonic() + min(_PATIENCE, self.left(request))
        while not (self.alive and self._take(request, ids)):
            if self.draining:
                raise shutting_down()
            if time.monotonic() > patience:
                raise ApiError(503, "the engine takes no requests now", "engine_down", retry_after=1)
            await asyncio.sleep(0.01)

    def _take(self, request: _Open, ids: list[int]) -> bool:
        """Give a request to the loop; False while that is ending."""
        taken = self.manager.add_request(
            ids, request_id=request.id, max_new_tokens=request.limit, streaming=True, eos_token_id=self.ends or -1
        )
        request.running = taken is not None
        return request.running

    async def tokens(self, request: _Open) -> AsyncIterator[Token]:
        """Its tokens, to the last. Raises ApiError where the engine failed or time is up."""
        while True:
            try:
                token = await asyncio.wait_for(request.tokens.get(), self.left(request))
            except asyncio.TimeoutError:
                raise late(self.limits.timeout) from None
            if isinstance(token, ApiError):
                raise token
            yield token
            if token.end is not None:
                return

    def left(self, request: _Open) -> float:
        """Seconds until its time is up."""
        return max(0.01, request.began + self.limits.timeout - time.monotonic())

    def leave(self, request: _Open) -> None:
        """The request is answered, or nobody waits for it; may be called twice."""
        if self._open.pop(request.id, None) is None:
            return
        seconds = time.monotonic() - request.began
        if not request.running:  # finished, failed, or never begun
            self._pace += 0.1 * (seconds - self._pace)
            self._forget(request.id)
            self._release(request.lease)
            return
        self.metrics.cancelled.inc()
        self._leaving[request.id] = request.lease
        self.manager.cancel_request(request.id)
        self.rows.ending.put(request.id)
        if not self.alive:
            self._on_loop(self._let_go, [request.id])

    def _arrived(self, request: _Open, output: GenerationOutput) -> None:
        """On the event loop: a request has one more token, or failed. Raises nothing: others' outputs come after it."""
        try:
            if output.error is None:
                self._hand_on(request, output)
                return
            request.running = False
            why = f"the engine failed while it computed this request: {output.error}"  # as `RowProcessor` tells it
            request.tokens.put_nowait(shutting_down() if self.draining else ApiError(500, why, "engine_error"))
        except Exception as error:
            request.tokens.put_nowait(failed("its token could not be handed on", error, "engine_error"))

    def _hand_on(self, request: _Open, output: GenerationOutput) -> None:
        new, finished = output.generated_tokens[request.given :], output.is_finished()
        if finished:
            request.running = False
        if request.given == 0 and new:
            self.metrics.first_token.labels(request.served_by).observe(time.monotonic() - request.began)
        for place, token in enumerate(new, start=request.given):
            last, logprob = finished and place == len(output.generated_tokens) - 1, output.logprobs[place]
            if not math.isfinite(logprob):  # as `sampling` says of a row without a distribution
                request.tokens.put_nowait(not_finite(None if request.lease is None else request.lease.name))
                break
            end = None if not last else "stop" if token in self.ends else "length"
            request.tokens.put_nowait(Token(token, logprob, end))
        request.given += len(new)
        self.metrics.generated.labels(request.served_by).inc(len(new))

    def _end_all(self) -> None:
        for request in self._open.values():
            request.tokens.put_nowait(shutting_down())

    def _restart(self) -> None:
        """On the event loop: the loop's thread has ended."""
        if self._loop is None or self.draining:
            return
        lived = time.monotonic() - self._started
        self._pause = _PAUSE if lived > _LONGEST_PAUSE else min(2 * self._pause, _LONGEST_PAUSE)
        self._loop.call_later(self._pause, self._revive)

    def _revive(self) -> None:
        if not self.draining:
            self.manager.join(time.perf_counter(), timeout=1)  # it has said its last words
            self.metrics.restarts.inc()
            self._started = time.monotonic()
            self.manager.start()

    # On transformers' thread

    def _assign(self, slots: Tensor | None) -> None:
        if self.pool is not None:
            self.pool.assign(slots)

    def _ended(self, ids: list[str]) -> None:
        self._on_loop(self._let_go, ids)

    def _stopped(self) -> None:
        self._on_loop(self._restart)

    def _on_loop(self, call: Callable[..., None], *given: Any) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the event loop is closed: `stop` releases what is left
                self._loop.call_soon_threadsafe(call, *given)

    # On the event loop

    def _let_go(self, ids: list[str]) -> None:
        for id in ids:
            self._forget(id)
            self._release(self._leaving.pop(id, None))

    def _forget(self, id: str) -> None:
        self.rows.by_id.pop(id, None)
        # a handler ends with its request's last output, which a cancelled one has not
        with self.manager.output_router._lock:
            self.manager.output_router.result_handlers.pop(id, None)

    def _release(self, lease: Lease | None) -> None:
        if lease is not None:
            lease.release()

    # Adapters

    async def _acquire(self, name: str, request: _Open) -> Lease:
        assert self.pool is not None
        try:
            lease = self.pool.try_acquire(name)
            return lease if lease is not None else await self._wait_for(name, request)
        except UnknownAdapterError as error:
            raise unknown(name) from error
        except AdapterLoadError as error:
            raise unusable(error) from error
        except PoolFull as error:
            raise late(self.limits.timeout, f": {error}") from error
        except Exception as error:
            if self.draining:
                raise shutting_down() from error
            raise failed(f"adapter {name!r} did not get into its slot", error, "engine_error", "model") from error

    async def _wait_for(self, name: str, request: _Open) -> Lease:
        pool = self.pool
        assert pool is not None
        waiting = self._threads.submit(lambda: pool.acquire(name, self.left(request)))
        try:
            return await asyncio.wrap_future(waiting)
        except asyncio.CancelledError:
            # The thread may get its lease all the same. Nobody waits for it any more.
            if not waiting.cancel():
                waiting.add_done_callback(lambda done: None if done.exception() else done.result().release())
            raise
