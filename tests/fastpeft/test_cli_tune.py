"""`fastpeft tune` with a clock that is not a GPU's: what it searches, writes, replaces and prints; and its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.apps.cli import tune
from fastpeft.apps.cli.app import app
from fastpeft.apps.training.testing import make_tiny_model
from typer.testing import CliRunner, Result

from peft_kernels import tuning, tuning_user
from peft_kernels.triton_lib import host

pytest.importorskip("triton", reason="Triton is not installed")
GPU = tune.Gpu("Card A", "sm_90", torch.device("meta"))


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, words)])


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with a "Card A", where a launch does nothing and takes as long as its tile is far from BM = 64."""
    last: list[int] = []

    def launch(kernel: Any, grid: Any, *args: Any, **constexprs: Any) -> None:
        last.append(constexprs.get("BM", 64))

    def seconds(run: Any, repeats: int = 20) -> float:
        last.clear()
        run()
        return 1e-6 * (1 + abs(last[0] - 64))

    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "find_gpu", lambda: GPU)
    monkeypatch.setattr(tuning_user, "gpus", lambda: frozenset({GPU.name}))
    monkeypatch.setattr(tuning, "_device_seconds", seconds)
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(host, "launch", launch)
    tuning_user.rows.cache_clear()
    with tuning.override("panels", from_M=2048, from_M_backward=2048):  # what is searched is the fused kernels
        yield tuning_user.path(GPU.arch)
    tuning_user.rows.cache_clear()


def test_the_fastest_is_kept_and_used(card: Path) -> None:
    shape = tuning.Shape(1024, 256, 128, 8, 16)
    frozen = tuning.choose("forward", "sm_90", shape)
    assert frozen.BM != 64
    done = invoke("--shape", "256x128", "--rows", "1000,8", "--rank", 8, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["gpu"], result["table"]) == ("Card A", str(card))
    assert result["rows_in_table"] == len(result["measured"])
    assert {row["kernel"] for row in result["measured"]} == {"project", "forward", "backward", "outer"}
    assert all(row["source"] == "measured" and row["M"] in (8, 1024) for row in result["measured"])
    assert all(row["microseconds"] <= row["microseconds_before"] for row in result["measured"])
    found = tuning.choose("forward", "sm_90", shape)
    assert (found.BM, found.source) == (64, "measured")
    written = json.loads(card.read_text())
    assert [row["source"] for row in written["rows"]] == ["measured"] * result["rows_in_table"]


def test_tables_of_several_runs_add_up(card: Path) -> None:
    first = json.loads(invoke("--shape", "256x128", "--rows", "300", "--json").stdout)
    second = json.loads(invoke("--shape", "384x128", "--rows", "300", "--json").stdout)
    assert second["rows_in_table"] > first["rows_in_table"]
    again = invoke("--shape", "384x128", "--rows", "400")
    assert again.exit_code == 0
    assert "0 measured now" in again.stdout, "the same bucket was searched in this process"


def test_a_model_is_tuned_layer_by_layer(card: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    shapes = tune.shapes_of_model(str(tmp_path / "model"))
    result = json.loads(invoke(tmp_path / "model", "--rows", "512", "--json").stdout)
    searched = {(row["N"], row["K"]) for row in result["measured"] if row["kernel"] == "forward"}
    assert searched <= set(shapes)
    assert searched


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "expected a model or --shape"),
        (("--shape", "4096"), "expected OUTxIN"),
        (("--shape", "0x64"), "expected OUTxIN"),
        (("--shape", "64x64", "--rows", "1,,2"), "expected numbers with commas"),
        (("--shape", "64x64", "--dtype", "int8"), "expected one of bf16, fp16, fp32"),
        (("--shape", "64x64", "--blocksize", "96"), "power of two"),
    ],
)
def test_bad_words(card: Path, words: tuple[str, ...], text: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 1
    assert text in done.stderr
    assert not card.exists()


def test_a_failed_search_writes_nothing(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **constexprs: Any) -> None:
        raise RuntimeError("a launch that fails")

    monkeypatch.setattr(host, "launch", broken)
    assert invoke("--shape", "256x128", "--rows", "300").exit_code != 0
    assert not card.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed() -> None:
    done = invoke("--shape", "256x128")
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "on an NVIDIA GPU" in done.stderr
    assert "run it on a machine with a GPU and torch's CUDA build" in done.stderr
