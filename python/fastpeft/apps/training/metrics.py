"""Records and display of a run: metrics.jsonl, the progress line, peak memory."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch

from ... import atomic_file, named_write_errors


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far, in MB: by torch on a GPU, by the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # kilobytes on Linux, bytes on macOS


class MetricsFile:
    """A line of json a step and adapter. Reopened for resuming, it drops torn lines and those from after a checkpoint.

    done: the steps that each adapter has behind it.
    """

    def __init__(self, path: Path, done: Mapping[str, int]) -> None:
        self.path = path
        kept: list[str] = []
        if any(done.values()) and path.is_file():
            kept = [json.dumps(line) for line in read_metrics(path) if _is_behind(line, done)]
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in kept)
            _to_disk(file)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        with named_write_errors(self.path):
            self._file.write(json.dumps(rounded) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Put the lines on the disk: a checkpoint that is there after a crash has its lines with it."""
        with named_write_errors(self.path):
            _to_disk(self._file)

    def close(self) -> None:
        with suppress(OSError):  # each line was flushed, and the error of one that was not is on its way
            self._file.close()


def _to_disk(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _is_behind(line: dict[str, Any], done: Mapping[str, int]) -> bool:
    steps = done.get(str(line.get("adapter", "default")), 0)
    return bool(steps) and line["step"] <= steps


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a line torn by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Progress(Protocol):
    """Receiver of the loop's messages."""

    def start(self, total: int, done: int) -> None: ...
    def step(self, line: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def notice(self, text: str) -> None: ...  # from a signal's handler, at any moment
    def stop(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, total: int, done: int) -> None: ...
    def step(self, line: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def notice(self, text: str) -> None: ...
    def stop(self) -> None: ...


def _columns(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.3f}"] if "loss" in line else []
    if "losses" in line:  # several adapters
        parts.append("loss " + ", ".join(f"{name} {loss:.3f}" for name, loss in line["losses"].items()))
    if "lr" in line:
        parts.append(f"lr {line['lr']:.1e}")
    if "tokens_per_s" in line:
        parts.append(f"{line['tokens_per_s']:.0f} tok/s")
    if "peak_memory_mb" in line:
        parts.append(f"peak {line['peak_memory_mb'] / 1000:.2f} GB")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: 0:07, 12:34, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 160 else words[:160] + "..."


class Console:
    """A rich progress bar on a terminal, a line every few seconds elsewhere; always on stderr."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole

        self.console = RichConsole(stderr=True)
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0
        self._total = 0
        self._began = (0.0, 0)  # when, and after which step
        self._held_out = ""

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, total: int, done: int) -> None:
        self._total, self._began = total, (time.monotonic(), done)
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[columns]}"),
            console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total, completed=done, columns="")
        self._bar.start()

    def step(self, line: dict[str, Any]) -> None:
        if "held_out_loss" in line:
            loss = line["held_out_loss"]
            by_name = loss.items() if isinstance(loss, dict) else [("", loss)]
            self._held_out = "  held-out" + ",".join(f" {name} {x:.3f}".replace("  ", " ") for name, x in by_name)
        columns = _columns(line) + self._held_out + self._left(line["step"])
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], columns=columns)
        elif time.monotonic() - self._last > 5 or line["step"] in (0, 1, self._total) or "held_out_loss" in line:
            self._last = time.monotonic()
            self.say(f"step {line['step']}/{self._total}  {columns}")
        for sample in line.get("samples", ()):
            of = f"{sample['adapter']}: " if "adapter" in sample else ""
            self.say(f"  {of}{_one_line(sample['prompt'])} -> {_one_line(sample['answer'])}")

    def _left(self, step: int) -> str:
        """The time left, by the mean of the steps so far, evaluations among them."""
        began, first = self._began
        if step <= first:  # the evaluation before the first step is no step
            self._began = time.monotonic(), step
            return ""
        seconds = (time.monotonic() - began) / (step - first) * (self._total - step)
        return f"  {duration(seconds)} left" if step < self._total else ""

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        with suppress(OSError):  # not through rich: it may be printing, interrupted
            os.write(2, f"\n{text}\n".encode())

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
