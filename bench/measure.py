"""Timing: candidates of one row are sampled in turn, in rotated order, each sample over several copies of its weights.

Interleaving lets a slow spell of the machine hit all candidates alike; the median and the 20th and 80th percentile say
how much it did. Copies keep the working set larger than the last-level cache: one weight called in a loop would sit in
it and show a speed that no model sees.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Clock = Callable[[Callable[[], object]], float]  # seconds that a call took


@dataclass
class Candidate:
    """One way to run a row. calls: the same work on copies of the weights; a sample runs `inner` of them."""

    name: str
    calls: Sequence[Callable[[], object]]
    enter: Callable[[], object] | None = None  # e.g. choose a CPU level, before each sample


@dataclass
class Stats:
    """Seconds per call."""

    samples: list[float] = field(default_factory=list)

    def at(self, quantile: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, round(quantile * (len(ordered) - 1)))]

    @property
    def median(self) -> float:
        return self.at(0.5)

    def as_dict(self) -> dict[str, float | int]:
        return {
            "median_s": self.median, "p20_s": self.at(0.2), "p80_s": self.at(0.8), "min_s": self.at(0.0),
            "samples": len(self.samples),
        }  # fmt: skip


def copies_needed(nbytes: int, cache_bytes: int, most: int = 256) -> int:
    """How many copies of a weight of `nbytes` make a working set twice the cache."""
    return max(2, min(most, -(-2 * cache_bytes // max(1, nbytes))))


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds that `run` took."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Callable[[], object]) -> float:
    """Seconds that the current CUDA device was at work on what `run` queued, from one event to another."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Turns:
    """Samples of candidates, taken in turn; `stats` holds each one's seconds per call.

    sample_s: a sample repeats the call until it lasts about this long. clock: times a sample.
    """

    def __init__(self, candidates: Sequence[Candidate], sample_s: float, clock: Clock = wall_clock) -> None:
        self.candidates, self.sample_s, self.clock = candidates, sample_s, clock
        self.stats = {c.name: Stats() for c in candidates}
        self._position = {c.name: 0 for c in candidates}
        self._calls: dict[str, int] = {}

    def warm(self) -> None:
        """Run each three times, and find how many calls a sample has."""
        for c in self.candidates:
            self._sample(c, 1)  # imports, allocations and repacking happen here
            once = min(self._sample(c, 1) for _ in range(2))
            self._calls[c.name] = max(1, min(4096, round(self.sample_s / max(once, 1e-7))))

    def round(self, number: int) -> None:
        """A sample of each, in rotated order."""
        for k in range(len(self.candidates)):
            c = self.candidates[(k + number) % len(self.candidates)]
            self.stats[c.name].samples.append(self._sample(c, self._calls[c.name]))

    def _sample(self, c: Candidate, n: int) -> float:
        if c.enter is not None:
            c.enter()
        calls, count = c.calls, len(c.calls)

        def run() -> None:
            i = self._position[c.name]
            for _ in range(n):
                calls[i]()
                i += 1
                if i == count:
                    i = 0
            self._position[c.name] = i

        return self.clock(run) / n


def interleave(
    candidates: Sequence[Candidate], rounds: int = 15, sample_s: float = 0.02, budget_s: float = 20.0,
    clock: Clock = wall_clock,
) -> dict[str, Stats]:  # fmt: skip
    """Median and percentiles of every candidate.

    rounds: samples of each, in rotated order. sample_s, clock: as of `Turns`. budget_s: stop after this many seconds in
    all, but never with fewer than 5 rounds.
    """
    turns = Turns(candidates, sample_s, clock)
    begin = time.perf_counter()
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        turns.warm()
        for r in range(rounds):
            turns.round(r)
            if r >= 4 and time.perf_counter() - begin > budget_s:
                break
    finally:
        if enabled:
            gc.enable()
    return turns.stats


def warm_everything(candidates: Sequence[Candidate], times: int = 1) -> None:
    """Run every copy, untimed: layers prepare themselves in their first calls, by which a sample must not be sized."""
    for c in candidates:
        if c.enter is not None:
            c.enter()
        for _ in range(times):
            for call in c.calls:
                call()


def threads(count: int | None) -> int:
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()
