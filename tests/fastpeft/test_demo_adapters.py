"""The demonstration of several adapters: its data, and all of it from start to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crash_tools import interrupted_on_console
from demo_tools import stand_in
from fastpeft.apps.cli.app import app
from fastpeft.apps.demo import adapters, docstyles, pydocs, throughput
from fastpeft.apps.training.metrics import read_metrics
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def styles() -> dict[str, list[pydocs.Pair]]:
    return docstyles.pairs()


def test_each_library_documents_in_its_own_way(styles: dict[str, list[pydocs.Pair]]) -> None:
    assert {style: len(pairs) > 200 for style, pairs in styles.items()} == {
        "python": True,
        "numpy": True,
        "torch": True,
    }
    for pair in styles["python"]:
        assert "\n" not in pair.answer
    for pair in styles["numpy"]:
        assert "\n\nParameters\n----------\n" in pair.answer
        assert " : " in pair.answer
    for pair in styles["torch"]:
        assert "->" in pair.answer.partition("\n")[0]
        assert "\n\nArgs:\n " in pair.answer
    by_name = {pair.name: pair.answer for pair in styles["torch"]}
    assert by_name["cosh"].startswith("cosh(input, *, out=None) -> Tensor\n\nReturns a new tensor with the hyperbolic")


def test_what_is_asked_was_in_nobodys_data(styles: dict[str, list[pydocs.Pair]]) -> None:
    for pairs in styles.values():
        names = [pair.name for pair in pairs]
        assert len(set(names)) == len(names)
        assert not set(names) & set(docstyles.SHOWN)
        train, held_out = pydocs.split(pairs)
        assert len(held_out) >= adapters.HELD_OUT_PAIRS
        assert not {p.answer for p in train} & {p.answer for p in held_out}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, styles: dict[str, list[pydocs.Pair]]) -> Path:
    stand_in(tmp_path, monkeypatch)
    few = {style: pairs[:80] for style, pairs in styles.items()}
    monkeypatch.setattr(docstyles, "pairs", lambda: few)
    monkeypatch.setattr(adapters, "HELD_OUT_PAIRS", 4)
    monkeypatch.setattr(adapters, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(throughput, "COUNTS", (1, 2, 4))
    monkeypatch.setattr(throughput, "ROWS", 4)
    return tmp_path


def test_from_start_to_end_and_after_a_crash(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tiny / "whole"
    done = CliRunner().invoke(app, ["demo-adapters", "--output", str(output), "--steps", "4", "--json"])
    assert done.exit_code == 0, done.output
    summary: dict[str, Any] = json.loads(done.stdout)
    for before, after in summary["held_out"].values():
        assert after < before
    columns = {"prompt", "__base__", "python", "numpy", "torch"}
    assert [set(a) for a in summary["answers"]] == [columns] * adapters.PROMPTS
    assert summary["throughput"]["adapters"] == [1, 2, 4]
    assert min(summary["throughput"]["one_batch"] + summary["throughput"]["one_after_another"]) > 0
    for picture in ("throughput.png", "loss.png"):
        assert (output / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = (output / "report.md").read_text()
    assert "![throughput](throughput.png)" in report
    assert all(a["prompt"] in report for a in summary["answers"])
    plan = CliRunner().invoke(app, ["train", str(output / "config.yaml"), "--dry-run", "--json"])
    assert {name: one["steps"] for name, one in json.loads(plan.stdout)["adapters"].items()} == dict.fromkeys(
        ("python", "numpy", "torch"), 4
    )
    adapters.show(summary)

    interrupted_on_console(monkeypatch, 3, lambda: adapters.run(tiny / "broken", 4))
    assert not (tiny / "broken" / "report.md").exists()
    again = adapters.run(tiny / "broken", 4)
    assert again["held_out"] == summary["held_out"]
    assert again["answers"] == summary["answers"]
    curves = [
        [(m["adapter"], m["step"], m.get("loss")) for m in read_metrics(folder / "metrics.jsonl")]
        for folder in (output, tiny / "broken")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 15
