"""A crash in the middle of training, at a step of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastpeft.apps.training.metrics import Console, Silent


class Stop(Exception):
    """Stands for a crash."""


class StopAt(Silent):
    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] == self.at:
            raise Stop


def interrupted(trainer: Any, at: int, **how: bool) -> None:
    """Run a trainer until it is in this step."""
    trainer.progress = StopAt(at)
    with pytest.raises(Stop):
        trainer.run(**how)


def interrupted_on_console(monkeypatch: pytest.MonkeyPatch, at: int, run: Callable[[], object]) -> None:
    """Call what makes a trainer of its own, which shows its steps on the console."""
    shown = Console.step

    def stopping(self: Console, line: dict[str, Any]) -> None:
        shown(self, line)
        if line["step"] == at:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Console, "step", stopping)
        with pytest.raises(Stop):
            run()
