"""Samples that a run takes of its model, and `--plan`: neither changes anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.apps.cli.app import app
from fastpeft.apps.training import metrics
from fastpeft.apps.training.config import load_config
from fastpeft.apps.training.inference import Answerer
from fastpeft.apps.training.measure import measure
from fastpeft.apps.training.metrics import Console, Silent, duration, read_metrics
from fastpeft.apps.training.run import prepare_all
from fastpeft.apps.training.testing import make_tiny_model, write_jsonl
from forms import matrix
from typer.testing import CliRunner

PROMPTS = ["colour 3?", "colour 7?"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model", layers=1)
    write_jsonl(folder / "data.jsonl", 40)
    settings = {
        "model": str(folder / "model"), "data": str(folder / "data.jsonl"), "eval_fraction": 0.2, "max_length": 48,
        "dtype": "float32", "max_steps": 5, "eval_every": 2, "learning_rate": 1e-2, "quantize": "none",
        "sample_prompts": PROMPTS, "sample_tokens": 6,
        "lora": {"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


def train(world: Path, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["train", str(world / "config.yaml"), "--json", *words])
    assert done.exit_code == 0, done.output
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def losses(folder: Path) -> list[tuple[Any, ...]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [tuple(line.get(k) for k in ("step", "loss", "held_out_loss")) for line in lines]


@pytest.mark.parametrize("words", matrix(
    ["gradient_checkpointing=true", "method=dora", "method=oft adapter.oft_block_size=4", "method=prefix_tuning",
     "method=vera", "quantize=nf4"],
    short=("gradient_checkpointing=true", "method=dora"),
))  # fmt: skip
def test_samples_are_taken_at_each_evaluation_and_change_no_bit(world: Path, tmp_path: Path, words: str) -> None:
    given = words.split()
    outputs = {name: tmp_path / name for name in ("with", "without")}
    train(world, f"output={outputs['with']}", *given)
    train(world, f"output={outputs['without']}", "sample_prompts=[]", *given)
    assert losses(outputs["with"]) == losses(outputs["without"])
    lines = read_metrics(outputs["with"] / "metrics.jsonl")
    found = {line["step"]: line["samples"] for line in lines if "samples" in line}
    assert list(found) == [0, 2, 4, 5]
    assert [sample["prompt"] for sample in found[5]] == PROMPTS
    answers = Answerer.load(None, str(outputs["with"] / "adapter")).answer(PROMPTS, 6)
    assert [sample["answer"] for sample in found[5]] == [answer.text for answer in answers]


def test_samples_without_anything_held_out(world: Path, tmp_path: Path) -> None:
    train(world, f"output={tmp_path}", "eval_fraction=0")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "samples" in line] == [0, 2, 4, 5]
    assert not [line for line in lines if "held_out_loss" in line]


@pytest.mark.parametrize("adapters", matrix([False, True], short=[False]))
def test_a_plan_is_measured_and_leaves_nothing(world: Path, tmp_path: Path, adapters: bool) -> None:
    words = [f"output={tmp_path / 'out'}", "batch_size=2", "packing=false", "max_steps=0", "epochs=2"]
    if adapters:
        data = str(world / "data.jsonl")
        own = {"a": {"data": data, "max_steps": 9}, "b": {"data": data, "max_steps": 4}}
        words.append("adapters=" + json.dumps(own))
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    found = train(world, *words, "--plan")
    assert not (tmp_path / "out").exists()
    assert {p: p.stat().st_mtime_ns for p in world.rglob("*")} == before
    measured = found["measured"]
    assert len(measured["step_seconds"]) == 3
    assert measured["empty_bytes"] > 0
    assert 0 < measured["peak_bytes"] <= measured["process_peak_bytes"]
    assert measured["evaluation_seconds"] > 0
    assert measured["seconds"] > measured["evaluation_seconds"]
    if not adapters:  # all tokens of the run, at the speed of those that were taken
        seconds = measured["seconds"] - measured["evaluation_seconds"]
        assert found["epochs"] == 2
        assert seconds * measured["tokens_per_s"] == pytest.approx(2 * found["tokens_per_epoch"])
    shown = CliRunner().invoke(app, ["train", str(world / "config.yaml"), *words, "--plan"]).stdout
    for part in ("memory: activations", "measured: steps", "measured: memory", "time: estimate"):
        assert part in shown


def test_a_plan_beside_an_earlier_run_leaves_it_alone(world: Path, tmp_path: Path) -> None:
    train(world, f"output={tmp_path}")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    settings = load_config(str(world / "config.yaml"), [f"output={tmp_path}"])
    state = torch.get_rng_state()
    assert len(measure(settings, prepare_all(settings), Silent())["step_seconds"]) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_time_left_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the mean of the steps that were taken here: not those before a resume, nor the evaluation before the first."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    assert [duration(s) for s in (6.6, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
    for first in (0, 100):
        with Console() as shown:
            shown.start(first + 40, first)
            now[0] += 50
            shown.step({"step": first})
            for step in (1, 2):
                now[0] += 30
                shown.step({"step": first + step, "loss": 1.0})
    left = [line.partition("  ")[2].split("  ")[-1] for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert left == ["19:30 left", "19:00 left"] * 2
