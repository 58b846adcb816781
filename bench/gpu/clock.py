"""Two clocks of a candidate on a GPU.

The eager clock times calls as Python makes them, from one event to another: up to some hundred rows it times Python.
The graph clock captures calls over all copies of the operands in a CUDA graph, once, and times its replays: what is
left is the GPU's own time, as a server that replays graphs sees it. A row reports both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ..measure import Candidate, Stats, interleave

Run = Callable[[], object]
NODES = 512  # at most so many calls in a graph
GRAPH_S = 2e-3  # a graph lasts about this long, so that starting it costs nothing beside


def record(run: Run, cuda: Any = None) -> Run:
    """A call that replays what `run` queues, captured once. Raises what refuses to be captured.

    `run` is made twice before, on the stream of the capture: it compiles, allocates and sets up libraries there, none
    of which a capture may hold. cuda: `torch.cuda`, or what stands for it in a test.
    """
    if cuda is None:
        import torch.cuda as cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        run()
        run()
    cuda.current_stream().wait_stream(side)
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, stream=side):
        run()
    graph.replay()  # the first replay loads the graph onto the device
    cuda.synchronize()
    replay: Run = graph.replay  # holds the graph, and with it the memory of its calls
    return replay


class Clocks(Protocol):
    """A device (bench/gpu/device.py), as far as its clocks go."""

    fake: bool

    def eager_clock(self, run: Run) -> float: ...

    def graphed(self, run: Run) -> Run: ...

    def synchronize(self) -> None: ...

    def trying(self, candidate: str) -> None: ...


def peak_mib(call: Run) -> float:
    """Memory that a call adds at its peak to what was allocated before it."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


class DeviceLost(RuntimeError):
    """A candidate after which the device serves no more: the process ends, and another goes on without it."""

    def __init__(self, candidate: str, why: BaseException) -> None:
        super().__init__(f"{candidate}: {reason(why)}")
        self.candidate = candidate


def reason(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def attempt(name: str | Callable[[], str], run: Callable[[], Any], device: Clocks) -> tuple[Any, str | None]:
    """(what `run` returns, None), or (None, why it failed). Raises `DeviceLost` where the device failed with it.

    name: the candidate's, or what says it afterwards."""
    if isinstance(name, str):
        device.trying(name)
    try:
        done = run()
        device.synchronize()  # a kernel's error is told at the next synchronisation
        return done, None
    except Exception as error:  # whatever a candidate raises empties its own place in the row and no other
        try:
            device.synchronize()
        except Exception as lost:
            raise DeviceLost(name if isinstance(name, str) else name(), lost) from error
        return None, reason(error)


def over_copies(candidate: Candidate, count: int) -> Run:
    """`count` calls, one copy of the operands after the other."""

    def run() -> None:
        for i in range(count):
            candidate.calls[i % len(candidate.calls)]()

    return run


def in_graph(copies: int, once: float) -> int:
    """How many calls a graph holds: every copy equally often, about `GRAPH_S` in all. once: seconds of a call."""
    return copies * max(1, min(NODES // copies, round(GRAPH_S / max(once * copies, 1e-9))))


def captured(candidate: Candidate, device: Clocks) -> tuple[Run, int]:
    """(a replay of a candidate's graph, the calls in it). A first graph says how long a call is without Python."""
    copies = len(candidate.calls)
    first = device.graphed(over_copies(candidate, copies))
    calls = in_graph(copies, min(device.eager_clock(first) for _ in range(3)) / copies)
    return (first if calls == copies else device.graphed(over_copies(candidate, calls))), calls


def _in_turns(candidates: Sequence[Candidate], device: Clocks, *limits: Any) -> tuple[dict[str, Stats], dict[str, str]]:
    """(`interleave` of the candidates that last, why others did not)."""
    now: list[str] = []  # the candidates that were sampled, the present one last

    def enter(name: str) -> None:
        now.append(name)
        device.trying(name)  # of a process that ends here it is known with which

    failed: dict[str, str] = {}
    while True:
        left = [Candidate(c.name, c.calls, partial(enter, c.name)) for c in candidates if c.name not in failed]
        run = partial(interleave, left, *limits, device.eager_clock)
        stats, why = attempt(lambda: now[-1], run, device)
        if why is None:
            return stats, failed
        failed[now[-1]] = why


@dataclass
class Measured:
    """eager, graph: seconds of a call per candidate, by either clock. calls: in a candidate's graph. peak: MiB that a
    call adds. failed: why a candidate has no times. uncaptured: why it has none by the graph clock."""

    eager: dict[str, Stats] = field(default_factory=dict)
    graph: dict[str, Stats] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    uncaptured: dict[str, str] = field(default_factory=dict)


def measure(
    candidates: Sequence[Candidate], device: Clocks, rounds: int = 9, sample_s: float = 0.008, budget_s: float = 4.0,
    graphs: bool = True,
) -> Measured:  # fmt: skip
    """Both clocks of all candidates, which take turns in rotated order. One that fails is left out and named. Without
    `graphs` the eager clock alone: of what a graph cannot hold, such as an optimizer's step."""
    limits = (5, 1e-9, 1.0) if device.fake else (rounds, sample_s, budget_s)
    found = Measured()
    alive: list[Candidate] = []
    for c in candidates:
        # every copy once: the first calls compile, and layers of others prepare themselves in them
        _, why = attempt(c.name, over_copies(c, len(c.calls)), device)
        if why is not None:
            found.failed[c.name] = why
            continue
        alive.append(c)
        if not device.fake:
            found.peak[c.name] = peak_mib(c.calls[0])
    found.eager, failed = _in_turns(alive, device, *limits)
    found.failed |= failed
    replays: list[Candidate] = []
    for c in alive:
        if c.name not in found.eager or not graphs:
            continue
        done, why = attempt(c.name, partial(captured, c, device), device)
        if why is None:
            replays.append(Candidate(c.name, [done[0]]))
            found.calls[c.name] = done[1]
        else:
            found.uncaptured[c.name] = why
    replayed, failed = _in_turns(replays, device, *limits)
    found.uncaptured |= failed
    found.graph = {name: Stats([s / found.calls[name] for s in t.samples]) for name, t in replayed.items()}
    return found
