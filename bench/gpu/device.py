"""The device that parts measure on: a GPU with two clocks, or a fake one on the CPU with made-up ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files
from .verdicts import Verdicts

Run = Callable[[], object]


@dataclass
class Device:
    """kind: of torch's tensors, "cuda" or "cpu". arch: 90 for sm_90, 0 of a fake device. backends: ours, that are
    measured. out: the folder of results. small: shapes and counts are to be as small as they can be. lost: candidates
    of this row with which a process was lost before, and how; the row is to leave them out. tried: the last one that
    the row named by `trying`."""

    kind: str
    name: str
    arch: int
    fake: bool
    backends: tuple[str, ...]
    out: Path
    verdicts: Verdicts = field(default_factory=Verdicts)
    broken: str | None = None  # of a fake device: what every later call says
    lost: dict[str, str] = field(default_factory=dict)
    tried: str | None = None
    _title: str = ""
    _readings: int = 0
    _note: Callable[[str], None] | None = None

    @property
    def small(self) -> bool:
        return self.fake

    def begin(self, title: str, lost: dict[str, str] | None = None, note: Callable[[str], None] | None = None) -> None:
        """The worker's call before each row."""
        self._title, self._readings, self.lost, self.tried, self._note = title, 0, lost or {}, None, note

    def trying(self, candidate: str) -> None:
        """A row's call before it runs a candidate: if the process is lost then, the row is done without this one."""
        self.tried = candidate
        if self._note is not None:
            self._note(candidate)

    def eager_clock(self, run: Run) -> float:
        """Seconds from one event to another around what `run` queues (a `measure.Clock`)."""
        if self.fake:
            return self._fake_seconds(run)
        from ..measure import cuda_clock

        return cuda_clock(run)

    def graphed(self, run: Run) -> Run:
        """`run` captured in a CUDA graph, after a call of it; calling the result replays it. Raises where it cannot be
        captured. Of a fake device `run` itself."""
        if self.fake:
            return run
        from .clock import record

        return record(run)

    def synchronize(self) -> None:
        """Wait for the device. Raises what went wrong on it, also if that was another call's."""
        if self.broken is not None:
            raise RuntimeError(self.broken)
        if not self.fake:
            import torch

            torch.cuda.synchronize()

    def wrong(self, op: str, backend: str, direction: str, dtype: str, m: int) -> str | None:
        """Why the tests found this wrong; None where they did not. The fields as in a row of times."""
        return self.verdicts.wrong(op, backend, direction, dtype, m)

    def rows_of(self, part: str) -> dict[str, dict[str, Any]]:
        """title -> row: what another part has measured in this run, such as the ceilings."""
        return files.rows(self.out / f"{part}.jsonl", files.settings(self.out).get("digest"))

    def _fake_seconds(self, run: Run) -> float:
        """A number that depends on the row and on how many were read before: the same in every run."""
        run()
        self._readings += 1
        drawn = hashlib.sha256(f"{self._title} {self._readings}".encode()).digest()
        return (1000 + int.from_bytes(drawn[:2], "little") % 1000) * 1e-6


class NoDevice(RuntimeError):
    """Nothing to measure on; the text says why."""


def find(out: Path, fake: bool = False) -> Device:
    """The GPU of this machine, or the fake one. Raises NoDevice where there is no GPU."""
    verdicts = Verdicts.read(out)
    if fake:
        return Device("cpu", "a fake device", 0, True, ("native",), out, verdicts)
    import torch

    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees none"
        raise NoDevice(f"a GPU run needs a CUDA device, and torch {torch.__version__} {why}")
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return Device("cuda", name, 10 * major + minor, False, ("cuda", "triton"), out, verdicts)
