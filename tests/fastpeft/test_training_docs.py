"""The first run of docs/cli.md, as it is written there, on a tiny model."""

from __future__ import annotations

import re
import runpy
import signal
from pathlib import Path

import pytest
from fastpeft.apps.cli.app import app
from fastpeft.apps.training.metrics import Console, read_metrics
from fastpeft.apps.training.testing import make_tiny_model
from typer.testing import CliRunner, Result

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def invoke(line: str, *more: str) -> Result:
    """A command as it is in the document: words in quotes are one."""
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|[^\s"]+', line.partition("  #")[0])]
    assert words.pop(0) == "fastpeft"
    return CliRunner().invoke(app, [*words, *more])


def test_a_first_run_by_copy_and_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = DOCUMENT.read_text(encoding="utf-8").partition("### A first run")[2].split("```")[1]
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"cat > (\S+) <<'END'\n(.*?)END\n", block, re.DOTALL):
        Path(name).write_text(text)
    runpy.run_path("make_chat.py")
    lines = Path("chat.jsonl").read_text().splitlines()
    assert len(lines) == 2000
    Path("chat.jsonl").write_text("\n".join(lines[:120]))
    make_tiny_model(tmp_path / "model", layers=1)
    small = ("model=model", "max_steps=6", "eval_every=2", "save_every=0", "batch_size=1", "max_eval_examples=4",
             "sample_tokens=4", "dtype=float32")  # fmt: skip
    plan, train, resume, generate = (line for line in block.splitlines() if line.startswith("fastpeft"))
    shown = invoke(plan, *small)
    assert "time: estimate" in shown.stdout
    assert not Path("runs").exists()

    step = Console.step

    def stop(self: Console, line: dict[str, object]) -> None:
        step(self, line)  # type: ignore[arg-type]
        if line["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "step", stop)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            ended = invoke(train, *small)
        finally:
            signal.signal(signal.SIGINT, before)
    assert ended.exit_code == 130
    assert "--resume" in ended.stderr
    assert invoke(resume, *small).exit_code == 0
    steps = read_metrics(Path("runs/chat/metrics.jsonl"))
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in steps if "samples" in line] == [0, 2, 4, 6]
    answered = invoke(generate, "--max-new-tokens", "4", "--json")
    assert answered.exit_code == 0
    assert '"prompt": "What is 20 plus 22?"' in answered.stdout
