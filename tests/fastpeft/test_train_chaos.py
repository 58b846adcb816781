"""The short form of `python -m bench --suite train-chaos`: runs that are killed, starved and broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from forms import by_form, matrix

from bench.suites.train_chaos import FAULTS, World, make_world, run_trial
from bench.suites.train_chaos_process import Run, make_context


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    names = by_form(short=("one",), full_form=("one", "several"))
    folder = tmp_path_factory.mktemp("chaos")
    return make_world(folder, None, folder / "kept", names, make_context())


@pytest.mark.parametrize("name", matrix(["one", "several"], short=["one"]))
@pytest.mark.parametrize(
    "faults", matrix(["SIGKILL,limit,flip", *(f"SIGKILL,{f}" for f in FAULTS)], short=["SIGKILL,limit,flip"])
)
def test_a_run_through_faults_is_the_uninterrupted_one(world: World, name: str, faults: str) -> None:
    trial = run_trial(world, name, f"{name}-{faults}", tuple(faults.split(",")))
    assert trial.problems == [], trial.log


def test_what_is_wrong_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other data than the uninterrupted run had: the trial says that its results differ."""
    words = world.words("one", Path("OUT"))
    monkeypatch.setattr(World, "words", lambda self, name, output: [words[0], f"output={output}", "seed=1"])
    trial = run_trial(world, "one", "other", ())
    assert any("metrics.jsonl differs" in problem for problem in trial.problems)
    assert any("adapter_model.safetensors is missing or differs" in problem for problem in trial.problems)


def test_a_run_that_does_not_end_is_found(world: World) -> None:
    run = Run(world.context, world.words("one", world.folder / "endless"))
    assert run.end(0.0) is None
    assert not run.running()
