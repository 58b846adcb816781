"""Launch configurations of the Triton kernels: frozen tables per architecture, and a search only when asked.

`tuned/<arch>.json` holds, per kernel, rows tried in order: the first whose limits hold gives the configuration. A row
says where it comes from: "model" (chosen from the instruction counts, registers and shared memory of the compiled
kernel; no clock has seen it) or "measured". The compilers are among the limits: `min_triton` ("3.8"), and
`from_registers` of a row with products whose left operand lies in registers, which not every ptxas gets right on sm_90
(`triton_lib/toolchain.py`); a row for the others follows it. An unknown GPU gets the table of the nearest older
architecture (sm_120 has the tensor-core instructions of sm_80, not of sm_90: its table points there).

`PEFT_KERNELS_TUNE=1` or `with searching():` times at most `MAX_CANDIDATES` configurations on first use of a shape
bucket and keeps the best for the process. `fastpeft tune` keeps what it found in a user table (`tuning_user.py`), which
is read before the frozen ones. Another configuration may split sums elsewhere, so a search or another user table can
change the last bits of results from one process to the next; without them they never change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from . import tuning_user
from .triton_lib import toolchain
from .triton_lib.toolchain import Toolchain

FOLDER = Path(__file__).parent / "tuned"
ENV = "PEFT_KERNELS_TUNE"
MAX_CANDIDATES = 4


@dataclass(frozen=True)
class Config:
    """Tile sizes (powers of two), Triton's options, and how many programs a split sum may grow to.

    BM: rows of x. BN, BK: out and in features (kernels with one feature axis use BN). BR: the largest tile of ranks.
    GROUP: rows of tiles that run together. programs: sums are split until about this many programs exist. LEFT: the
    weight is the left operand of the large products (forward, backward).
    """

    BM: int
    BN: int = 16
    BK: int = 16
    BR: int = 64
    GROUP: int = 8
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 1
    LEFT: bool = True
    source: str = "model"


@dataclass(frozen=True)
class Panels:
    """When a product is left to the vendor's matmul: from how many rows, over a 4-bit weight (another number in the
    backward, where one is given) and over a dense one; and the most elements of a panel of a 4-bit weight, of which two
    stand decoded at once (they should stay in the L2 cache)."""

    from_M: int
    from_M_dense: int
    elements: int
    source: str = "model"
    from_M_backward: int | None = None

    def least(self, backward: bool) -> int:
        """Rows over a 4-bit weight."""
        return self.from_M if not backward or self.from_M_backward is None else self.from_M_backward


@dataclass(frozen=True)
class Shape:
    """Facts that a configuration may depend on. bits: of an element of x. blocksize: of a 4-bit weight.

    plain: rows of every operand start at a multiple of 16 elements and rows of the weight at a block. Elsewhere loads
    are narrow and need many registers, so the tables have small tiles for it.
    """

    M: int
    N: int
    K: int
    r: int
    bits: int
    plain: bool = True
    blocksize: int = 64


_overrides: dict[str, dict[str, Any]] = {}
_found: dict[tuple[str, str, Shape], list[tuple[float, Config]]] = {}
Clock = Callable[[Callable[[], object]], float]  # seconds of one run
_clock: Clock | None = None
_assumed: int | None = None
_searching = os.environ.get(ENV, "") not in ("", "0")


@cache
def architectures() -> dict[int, str]:
    """Compute capability -> table, of the tables there are."""
    return {int(p.stem[3:]): p.stem for p in FOLDER.glob("sm_*.json")}


@cache
def nearest(capability: int) -> str:
    """The table for a compute capability (80, 90, ...): its own, else the newest older one, else the oldest."""
    known = sorted(architectures())
    older = [c for c in known if c <= capability]
    return architectures()[older[-1] if older else known[0]]


@cache
def table(arch: str) -> dict[str, Any]:
    """The parsed `tuned/<arch>.json`; "like" names a table that fills in what it does not say, kernel by kernel."""
    data: dict[str, Any] = json.loads((FOLDER / f"{arch}.json").read_text())
    if "like" not in data:
        return data
    like = table(data["like"])
    return {**like, **data, "kernels": {**like["kernels"], **data.get("kernels", {})}}


def _row_config(row: dict[str, Any], programs: int) -> Config:
    names = {f.name for f in fields(Config)}
    return Config(**{"programs": programs, **{k: v for k, v in row.items() if k in names}})


def compiles(row: dict[str, Any], compilers: Toolchain) -> bool:
    """True where a row of a table is for these compilers."""
    least = toolchain.numbers(row.get("min_triton", ""))
    return compilers.triton >= least and (compilers.wgmma_from_registers or not row.get("from_registers", False))


def _fits(row: dict[str, Any], shape: Shape, compilers: Toolchain | None) -> bool:
    most = {"max_M": shape.M, "max_N": shape.N, "max_K": shape.K, "max_r": shape.r}
    return (
        (compilers is None or compiles(row, compilers))
        and row["bits"] == shape.bits
        and (shape.bits == 32 or row.get("plain", True) == shape.plain)
        and shape.blocksize >= row.get("min_blocksize", 0)
        and row.get("min_M", 0) <= shape.M
        and all(v <= row.get(k, v) for k, v in most.items())
    )


@lru_cache(maxsize=4096)
def _rows(kernel: str, arch: str, shape: Shape, compilers: Toolchain | None) -> tuple[Config, ...]:
    data = table(arch)
    return tuple(_row_config(row, data["programs"]) for row in data["kernels"][kernel] if _fits(row, shape, compilers))


def rows(kernel: str, arch: str, shape: Shape) -> tuple[Config, ...]:
    """Every row of the table that fits, under the compilers that are here, best guess first."""
    return _rows(kernel, arch, shape, toolchain.of(arch))


def choose(kernel: str, arch: str, shape: Shape, run: Callable[[Config], object] | None = None) -> Config:
    """The configuration of `kernel` for a shape. `run` launches it once with a given configuration: for searching."""
    candidates = rows(kernel, arch, shape)
    config = candidates[0] if _assumed is not None else _measured(kernel, arch, shape, candidates) or candidates[0]
    if _searching and run is not None and len(candidates) > 1:
        key = (kernel, arch, bucket(shape))
        if key not in _found:
            _found[key] = timed(candidates, run, _clock)
        config = min(_found[key], key=_seconds)[1]
    if kernel in _overrides:
        config = replace(config, **_overrides[kernel])
    return config


def found() -> dict[tuple[str, str, Shape], list[tuple[float, Config]]]:
    """Timings of this process's searches: (kernel, table, bucket) -> (seconds, configuration), as in the table."""
    return dict(_found)


def _measured(kernel: str, arch: str, shape: Shape, candidates: Sequence[Config]) -> Config | None:
    """The configuration that `fastpeft tune` measured for the bucket on a GPU like the one here; None where it is a row
    that the table does not have for the compilers that are here."""
    known = tuning_user.rows(arch)
    values = known.get((kernel, *asdict(bucket(shape)).values())) if known else None
    if values is None:
        return None
    found = Config(**values)
    here = {replace(c, source="") for c in candidates}
    others = {replace(c, source="") for c in _rows(kernel, arch, shape, None)} - here
    return None if replace(found, source="") in others else found


def panels(arch: str) -> Panels:
    """The `Panels` of an architecture; `override("panels", ...)` applies."""
    return Panels(**{**table(arch)["panels"], **_overrides.get("panels", {})})


def bucket(shape: Shape) -> Shape:
    """The shape with M and r rounded up to powers of two: one search serves the whole bucket."""
    return replace(shape, M=1 << (shape.M - 1).bit_length(), r=1 << max(shape.r - 1, 0).bit_length())


def search(candidates: Sequence[Config], run: Callable[[Config], object], clock: Clock | None = None) -> Config:
    """The fastest of the first `MAX_CANDIDATES`; one that does not fit the GPU is passed over."""
    return min(timed(candidates, run, clock), key=_seconds)[1]


def _seconds(measured: tuple[float, Config]) -> float:
    return measured[0]


def timed(
    candidates: Sequence[Config], run: Callable[[Config], object], clock: Clock | None = None
) -> list[tuple[float, Config]]:
    """(seconds, configuration) of the first `MAX_CANDIDATES` that fit the GPU; RuntimeError where none does."""
    done: list[tuple[float, Config]] = []
    for config in candidates[:MAX_CANDIDATES]:
        try:
            seconds = (clock or _device_seconds)(lambda config=config: run(config))
        except Exception as e:
            if type(e).__name__ not in ("OutOfResources", "PTXASError"):
                raise
            continue
        done.append((seconds, replace(config, source="measured")))
    if not done:
        raise RuntimeError(f"tuning: none of {len(candidates)} configurations fits this GPU")
    return done


def _device_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a launch on the current CUDA device, after the compilation and one more run. Its inputs are out
    of the L2 cache, as a layer's weight is when its turn comes."""
    run()
    run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")  # bytes: twice the largest L2 there is
    for start, end in marks:
        other.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks)[repeats // 2] / 1e3


@contextmanager
def searching(on: bool = True, clock: Clock | None = None) -> Iterator[None]:
    """Search (or not) within the block, whatever the environment says. clock: seconds of a run, instead of the GPU."""
    global _searching, _clock
    before = _searching, _clock
    _searching, _clock = on, clock
    try:
        yield
    finally:
        _searching, _clock = before


@contextmanager
def override(kernel: str, **values: Any) -> Iterator[None]:
    """Within, `choose(kernel, ...)` returns a configuration with these values: for tests and experiments."""
    before = _overrides.get(kernel)
    _overrides[kernel] = {**(before or {}), **values}
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


@contextmanager
def assuming(capability: int) -> Iterator[None]:
    """Within, `arch_of` answers for this compute capability: for compiling without the GPU."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def arch_of(device: torch.device) -> str:
    """The table for a device; CPU tensors (Triton's interpreter) use that of sm_90."""
    if _assumed is not None:
        return nearest(_assumed)
    return nearest(_capability(device) if device.type == "cuda" else 90)
