"""A demonstration's output folder: whether it goes on from an interrupted run, and the files that repeat the run."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import atomic_file
from ..training.config import TrainConfig

_RESULTS = ("metrics.jsonl", "loss.png", "report.md", "state.json", "throughput.png")


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def mark(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round(now - self._last, 2)
        self._last = now


def continue_or_clear(output: Path, settings: TrainConfig) -> bool:
    """True to resume: the folder holds an unfinished run of the same settings. Else remove what an earlier run left."""
    from ..training import checkpoints

    state = output / "state.json"
    roots = [Path(one.output) for one in settings.each().values()]
    if state.is_file():
        try:
            stored = json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        same = stored == {"finished": False, "settings": settings.to_dict()}
        if same and any(checkpoints.newest(root) is not None for root in roots):
            return True
    for root in roots:
        checkpoints.clear(root)
    for name in _RESULTS:
        (output / name).unlink(missing_ok=True)
    mark(output, finished=False, settings=settings)
    return False


def mark(output: Path, finished: bool, settings: TrainConfig) -> None:
    """Write down whether the run of these settings is finished."""
    output.mkdir(parents=True, exist_ok=True)
    state = {"finished": finished, "settings": settings.to_dict()}
    write_text(output / "state.json", json.dumps(state, indent=1))


def there(output: Path, *names: str) -> str:
    """Those of these files that a folder holds, for a list: "a, b, "."""
    return "".join(f"{name}, " for name in names if (output / name).is_file())


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_records(file: Path, records: list[tuple[str, dict[str, Any]]]) -> None:
    write_text(file, "".join(json.dumps(record) + "\n" for _, record in records))


def write_config(output: Path, settings: dict[str, Any]) -> None:
    """The settings as a file, so that `fastpeft train` can repeat and vary the run, into another folder."""
    values = {**settings, "output": f"{output}-again"}
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in values.items()]  # JSON values are YAML
    write_text(output / "config.yaml", "# fastpeft train config.yaml key=value ...\n" + "".join(lines))


def shown(answer: Any) -> str:
    """An answer as it is printed, with a mark where it was cut."""
    return str(answer.text) if answer.complete else f"{answer.text} …"
