"""Counters of the server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SERVED_BY = ("base", "adapter", "unknown")  # whom a request was for; names of adapters would be a series each


class Metrics:
    """One server's. adapter: one of `SERVED_BY`; status: of HTTP, 499 where the client went away before the answer."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: Any = {"registry": self.registry}
        by = ["adapter"]
        self.requests = Counter("fastpeft_requests", "Requests answered.", ["endpoint", "status", "adapter"], **given)
        self.prompt = Counter("fastpeft_prompt_tokens", "Tokens of prompts.", by, **given)
        self.generated = Counter("fastpeft_generated_tokens", "Tokens made.", by, **given)
        timed = {"buckets": _SECONDS, **given}
        self.first_token = Histogram("fastpeft_time_to_first_token_seconds", "Of a request.", by, **timed)
        self.latency = Histogram("fastpeft_request_seconds", "To the end of the answer.", by, **timed)
        self.batch = Histogram("fastpeft_batch_requests", "Requests in a forward.", buckets=_SIZES, **given)
        self.batch_tokens = Histogram("fastpeft_batch_tokens", "Tokens in a forward.", buckets=_SIZES, **given)
        self.cancelled = Counter("fastpeft_cancelled", "Requests taken out of the batch before their end.", **given)
        why: Any = {"labelnames": ["reason"], **given}
        self.connections = Counter("fastpeft_connections", "Connections that came.", **given)
        self.refused = Counter("fastpeft_refused", "Connections and requests over a limit.", **why)
        self.timed_out = Counter("fastpeft_timed_out", "Connections and requests that were late.", **why)
        self.restarts = Counter("fastpeft_engine_restarts", "Starts of the engine after its loop ended.", **given)

    def stepped(self, requests: int, tokens: int) -> None:
        self.batch.observe(requests)
        self.batch_tokens.observe(tokens)

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A value that is read when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(value)

    def watch_pool(self, stats: Callable[[], Any]) -> None:
        self.registry.register(_Pool(stats))  # type: ignore[arg-type]

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Pool:
    """The adapter pool's counts, read when they are asked for."""

    _COUNTERS = (("hits", "Adapters that were in a slot when they were asked for."),
                 ("misses", "Adapters that were not."), ("evictions", "Adapters that had to leave their slot."),
                 ("loads", "Adapter files read."), ("failures", "Adapter files that could not be used."))  # fmt: skip
    _GAUGES = (("adapters", "Adapters known."), ("resident", "Adapters in slots."), ("max_resident", "Slots."),
               ("in_use", "Adapters that requests hold."), ("in_flight", "Adapters being read."),
               ("virtual_tokens", "Virtual tokens of prompts that may be in slots."),
               ("virtual_tokens_taken", "Of them, those that are."),
               ("nbytes", "Bytes of the slots and of what prompts hold."))  # fmt: skip

    def __init__(self, stats: Callable[[], Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        for name, what in self._COUNTERS:
            yield CounterMetricFamily(f"fastpeft_pool_{name}", what, value=getattr(stats, name))
        for name, what in self._GAUGES:
            yield GaugeMetricFamily(f"fastpeft_pool_{name}", what, value=getattr(stats, name))
