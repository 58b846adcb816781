"""A row of times in the making: candidates of ours by backend, those of others, both clocks, the bound.

What a part returns has the fields that bench/gpu/parts/__init__.py names, and beside them what the answer sheet does
not need: percentiles, peak memory, the configurations that Triton's kernels chose and could have chosen, errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from peft_kernels import tuning, use_backend

from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..static import gpus
from . import clock
from .device import Device

ROWS = (1, 4, 16, 64, 128, 512, 2048, 8192)
BY_WORTH = (1, 128, 512, 2048, 16, 8192, 64, 4)  # the same, what is most wanted first
SHAPES = ((4096, 14336), (4096, 4096))  # in x out features: gate and up, attention of an 8B model
RANK = 16
SCALING = 2.0
EAGER_ROWS = 128  # the reference is slow, and its temporaries large
MOST_ERROR = 0.02  # of a result's norm: five times what bfloat16 costs a product, far below any wrong sum
WORST = 1e9
CHECKED = 256  # rows of a result that are compared
BACKENDS = ("cuda", "triton", "native")
NEVER = 1 << 40
# How Triton is forced: what stands in tuning's `Panels` meanwhile
PANELS: dict[str, dict[str, int]] = {
    "fused": {"from_M": NEVER, "from_M_dense": NEVER}, "panels": {"from_M": 1, "from_M_dense": 1},
}  # fmt: skip
Call = Callable[[], Any]


def grid(device: Device, rows: Sequence[int] = BY_WORTH) -> list[tuple[int, int, int]]:
    """(m, K, N) of every row of x and shape, in order of worth."""
    shapes, counts = (((64, 128),), (1, 16)) if device.small else (SHAPES, tuple(rows))
    return [(m, k, n) for m in counts for k, n in shapes]


def titled(device: Device, what: Sequence[str], rows: Sequence[int] = BY_WORTH) -> list[str]:
    """`forward 4096x14336 M=1`, ... for each of `what` at each place of the grid."""
    return [f"{one} {k}x{n} M={m}" for m, k, n in grid(device, rows) for one in what]


def place(title: str) -> tuple[str, int, int, int]:
    """(what, m, K, N) of a title that `titled` made."""
    what, shape, rows = title.rsplit(" ", 2)
    k, n = (int(v) for v in shape.split("x"))
    return what, int(rows.removeprefix("M=")), k, n


def copies(device: Device, nbytes: float, most: int = 64) -> int:
    """How many copies of an operand leave none of it in the L2 cache; two on a fake device."""
    return 2 if device.small else copies_needed(int(nbytes), last_cache_bytes(device.kind), most)


def normal(device: Device, *shape: int, seed: int = 3, scale: float = 1.0, dtype: Any = torch.bfloat16) -> Tensor:
    """Normally distributed numbers, made on the device."""
    g = torch.Generator(device.kind).manual_seed(seed)
    return (torch.randn(shape, generator=g, device=device.kind) * scale).to(dtype)


def gradient(function: Callable[[], Any], leaves: Sequence[Tensor], dy: Any) -> Call:
    """A forward and its backward: the gradients of `leaves`, which require them. dy: of each result."""
    return lambda: torch.autograd.grad(function(), leaves, dy)


def first_tensor(result: Any) -> Tensor:
    """The first tensor of what a call returns."""
    return result if isinstance(result, Tensor) else first_tensor(result[0])


def error_of(result: Any, exact: Tensor) -> float:
    """The norm of the difference of the first rows, over the exact result's; `WORST` of numbers that are none."""
    got = first_tensor(result).detach()[: len(exact)].float()
    error = float((got - exact).norm() / exact.norm())
    return error if error < WORST else WORST


@contextmanager
def configurations() -> Iterator[dict[str, dict[str, Any]]]:
    """Within, what Triton's kernels ask the tables: kernel -> its shape, the configuration, the others that fit."""
    found: dict[str, dict[str, Any]] = {}
    choose = tuning.choose

    def noting(kernel: str, arch: str, shape: tuning.Shape, run: Any = None) -> tuning.Config:
        config = choose(kernel, arch, shape, run)
        others = [asdict(c) for c in tuning.rows(kernel, arch, shape) if c != config]
        found[kernel] = {"table": arch, "shape": asdict(shape), "config": asdict(config), "others": others}
        return config

    # backends look `choose` up in the module at each call, and no other place sees all that they launch
    tuning.choose = noting
    try:
        yield found
    finally:
        tuning.choose = choose


def bounds(device: Device, flops: float, nbytes: float) -> dict[str, Any]:
    """bound_s and what it is of ("products", "memory"), by the ceilings that this run has measured; and the same by the
    maker's data sheet, where bench/static/gpus.py has it. Empty where neither is known."""
    found: dict[str, Any] = {}
    measured = device.rows_of("ceilings")
    gbs, tflops = measured.get("copy", {}).get("gbs"), measured.get("gemm", {}).get("tflops")
    if gbs and tflops:
        products, memory = flops / tflops / 1e12, nbytes / gbs / 1e9
        found = {"bound_s": max(products, memory), "bound_by": "products" if products > memory else "memory"}
    if (sheet := data_sheet(device.name)) is not None:
        found["data_sheet_bound_s"] = max(flops / sheet.tflops / 1e12, nbytes / sheet.gbs / 1e9)
    return found


def data_sheet(name: str) -> gpus.Gpu | None:
    """The public numbers of a GPU of that name; None of another."""
    known = [n for n in gpus.GPUS if n.removeprefix("RTX ").lower() in name.lower()]
    return gpus.GPUS[max(known, key=len)] if known else None


@dataclass
class Row:
    """A row to be measured. shape: text, "4096x14336"; more: fields of the row beside those that every one has."""

    device: Device
    op: str
    direction: str
    m: int
    shape: str
    flops: float
    nbytes: float
    more: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    candidates: list[Candidate] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    bases: set[str] = field(default_factory=set)  # candidates of which the result is another: a part of the work

    def ours(self, calls: Sequence[Call], panels: bool = False, suffix: str = "") -> None:
        """The same calls with each of the device's backends forced. panels: Triton's twice, with the vendor's product
        over decoded panels and without, whatever the tables say."""
        for backend in self.device.backends:
            # on a fake device the CPU's backend stands for Triton's two ways
            both = panels and backend in ("triton", "native")
            for how in PANELS if both else [""]:
                name = " ".join(filter(None, (backend, how, suffix)))
                wrong = self.device.wrong(self.op, backend, self.direction, self.dtype, self.m)
                if wrong is not None:
                    self.refused[name] = wrong
                else:
                    values = PANELS.get(how, {})
                    self.candidates.append(Candidate(name, [_forced(c, backend, values) for c in calls]))

    def eager(self, calls: Sequence[Call], name: str = "reference") -> None:
        """Our reference, plain torch, where the rows are few."""
        if self.m > EAGER_ROWS:
            self.refused[name] = f"left out from {EAGER_ROWS + 1} rows on: it is slow and its temporaries are large"
        else:
            self.candidates.append(Candidate(name, [_forced(c, "reference", {}) for c in calls]))

    def add(self, name: str, calls: Sequence[Call]) -> None:
        self.candidates.append(Candidate(name, calls))

    def base(self, name: str, calls: Sequence[Call]) -> None:
        """A part of the work, such as the product without the adapter: its result is not compared."""
        self.bases.add(name)
        self.add(name, calls)

    def optional(self, name: str, package: str, make: Callable[[], Sequence[Call]]) -> None:
        """Calls of a package that may be missing, or that may refuse."""
        if find_spec(package) is None:
            self.refused[name] = f"{package} is not installed"
            return
        made, why = clock.attempt(name, make, self.device)
        if why is None:
            self.add(name, made)
        else:
            self.refused[name] = why

    def measure(
        self, exact: Tensor | None = None, chosen: str | None = None, most: float = MOST_ERROR, graphs: bool = True
    ) -> dict[str, Any]:
        """The row. exact: float32 first rows of the result: a candidate of which the first call is off by more than
        `most` of its norm gets no numbers. chosen: the backend that serves the call unasked. graphs: with both clocks.
        """
        errors: dict[str, float] = {}
        configs: dict[str, Any] = {}
        left: list[Candidate] = []
        # ours are captured first: a capture that a later one refuses must not stand in their way
        for c in sorted(self.candidates, key=lambda c: _rank(c.name)):
            if c.name in self.device.lost:
                continue  # the worker gives its reason
            self.device.trying(c.name)
            with configurations() as found:
                done, why = clock.attempt(c.name, c.calls[0], self.device)
            if why is None and exact is not None and c.name not in self.bases:
                errors[c.name] = error_of(done, exact)
                if errors[c.name] > most:
                    why = f"its result is off by {errors[c.name]:.2g} of the exact one's norm, allowed {most}"
            del done
            if why is not None:
                self.refused[c.name] = why
                continue
            left.append(c)
            if found:
                configs[c.name] = dict(found)
        got = clock.measure(left, self.device, graphs=graphs)
        self.refused |= got.failed
        row: dict[str, Any] = {
            "op": self.op, "direction": self.direction, "dtype": self.dtype, "m": self.m, "shape": self.shape,
            "times": times_of(got), "refused": self.refused, "flops": self.flops, "nbytes": self.nbytes,
            **bounds(self.device, self.flops, self.nbytes), **self.more,
            "spread": {"eager": {k: s.as_dict() for k, s in got.eager.items()},
                       "graph": {k: s.as_dict() for k, s in got.graph.items()}},
            "without_graph": got.uncaptured, "calls_in_graph": got.calls, "peak_mib": got.peak, "errors": errors,
            "configs": configs,
        }  # fmt: skip
        if chosen is not None:
            row["chosen"] = chosen
        if self.device.fake:
            row["stands_in"] = f"{', '.join(self.device.backends)} of the CPU for the GPU's backends; times are made up"
        return row


def _rank(name: str) -> int:
    """Ours, then others', then the reference, which looks at values on the host."""
    return 0 if name.split(" ")[0] in BACKENDS else 2 if name == "reference" else 1


def times_of(got: clock.Measured) -> dict[str, dict[str, float]]:
    """candidate -> its medians; a clock that could not be had is left out."""
    both: Mapping[str, Any] = {"graph_s": got.graph, "eager_s": got.eager}
    return {name: {key: stats[name].median for key, stats in both.items() if name in stats} for name in got.eager}


def _forced(call: Call, backend: str, panels: dict[str, int]) -> Call:
    """`call` with a forced backend. Forcing costs Python about 5 us, in every candidate of ours alike; a graph's replay
    does not see it."""

    def forced() -> Any:
        with use_backend(backend):
            return call()

    def through_panels() -> Any:
        with use_backend(backend), tuning.override("panels", **panels):
            return call()

    return through_panels if panels else forced
