"""A run that is stopped, finds no room, or is begun anew: what it leaves, and that resuming is exact."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_tools import interrupted
from fastpeft.apps.cli.app import app
from fastpeft.apps.training import checkpoints, run
from fastpeft.apps.training.config import TrainConfig, from_dict
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.loop import Trainer
from fastpeft.apps.training.metrics import Console, Silent, read_metrics
from fastpeft.apps.training.output import held
from fastpeft.apps.training.stop import Interrupted, Terminated
from fastpeft.apps.training.testing import make_tiny_run
from fastpeft.apps.training.track import Track
from forms import matrix
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers of this size only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("world"), 12, layers=1)


def config(world: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {
        "model": str(world / "model"), "data": str(world / "data.jsonl"), "output": str(output), "max_length": 48,
        "dtype": "float32", "quantize": "none", "max_steps": 5, "lora": {"r": 2, "target_modules": ["q_proj"]},
    }  # fmt: skip
    return from_dict({**values, **changes})


def trainer(settings: TrainConfig, progress: Silent | None = None) -> Trainer:
    """A trainer with its model, which knows nothing of locks."""
    prepared = run.prepare(settings)
    pad = prepared.tokenizer.pad_token_id
    track = Track("default", settings, prepared.train.examples, prepared.held_out.examples, pad)
    return Trainer(settings, run.adapted_model(prepared), [track], pad, torch.device("cpu"), progress or Silent())


def train(settings: TrainConfig, progress: Silent | None = None, **how: bool) -> Any:
    """All but the adapter's folder and the curve, which takes longest."""
    with held(settings):
        return trainer(settings, progress).run(**how)["default"]


def train_and_save(settings: TrainConfig, progress: Silent | None = None, **how: bool) -> Any:
    return run.train(run.prepare(settings), progress or Silent(), **how)[0]


def invoke(settings: TrainConfig, *options: str) -> Result:
    words = [f"{name}={json.dumps(value)}" for name, value in settings.to_dict().items() if name != "adapters"]
    return CliRunner().invoke(app, ["train", *words, *options])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(line["step"], line.get("loss"), line.get("grad_norm")) for line in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint-5" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    train(config(world, output))
    return output


# --- no room ----------------------------------------------------------------------------------------------------------


class Full(Silent):
    """Lets no file grow beyond so many bytes, from a step on or from the end of the loop on."""

    def __init__(self, limit: int, step: int | None = None) -> None:
        self.limit, self.at = limit, step

    def set(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] == self.at:
            self.set()

    def stop(self) -> None:
        if self.at is None:
            self.set()


@pytest.fixture
def unlimited() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("what", "full", "left"),
    matrix(
        [("checkpoint-4", Full(1200, 3), 2), ("metrics.jsonl", Full(1, 3), 2), ("adapter", Full(100), 5),
         ("loss.png", Full(9000), 5)],
        short=lambda what, *_: what != "adapter",
    ),
)  # fmt: skip
def test_no_room_is_named_and_resuming_is_exact(
    world: Path, whole: Path, tmp_path: Path, unlimited: None, what: str, full: Full, left: int
) -> None:
    settings = config(world, tmp_path, save_every=2)
    with pytest.raises(UserError) as caught:
        train_and_save(settings, full)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert f"output: cannot write {tmp_path / what}: " in str(caught.value)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert "`--resume` then goes on from the newest checkpoint, which is whole" in str(caught.value)
    assert checkpoints.newest(tmp_path) == tmp_path / f"checkpoint-{left}"
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]
    assert train_and_save(settings, resume=True).resumed_from == left
    assert losses(tmp_path) == losses(whole)
    assert weights(tmp_path) == weights(whole)


def test_a_resume_without_room_keeps_the_metrics(world: Path, tmp_path: Path, unlimited: None) -> None:
    settings = config(world, tmp_path, max_steps=2)
    train(settings)
    before = content(tmp_path)
    full = Full(50)
    full.set()
    with pytest.raises(UserError, match="cannot be written"):
        train(settings, resume=True)
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl"):
        trainer(settings).run(resume=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert content(tmp_path) == before


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def python_handlers() -> Iterator[None]:
    """The handlers that Python sets, whatever runs the tests."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Signal(Silent):
    """Sends this process a signal in a step, so many times; what is told then is kept."""

    def __init__(self, number: int, step: int = 3, times: int = 1) -> None:
        self.number, self.at, self.times = number, step, times
        self.told: list[str] = []

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] == self.at:
            for _ in range(self.times):
                signal.raise_signal(self.number)

    def notice(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.usefixtures("python_handlers")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Terminated)])
def test_a_signal_ends_after_the_step_with_a_checkpoint(
    world: Path, whole: Path, tmp_path: Path, number: int, error: type[BaseException]
) -> None:
    settings, sent = config(world, tmp_path), Signal(number)
    with pytest.raises(error) as caught:
        train(settings, sent)
    assert sent.told == ["ending after this step, with a checkpoint; once more ends at once"]
    assert caught.value.problem == f"ended after step 3 of 5, as asked; wrote {tmp_path / 'checkpoint-3'}"
    assert "--resume" in caught.value.fix
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(settings, resume=True).resumed_from == 3
    assert losses(tmp_path) == losses(whole)
    assert weights(tmp_path) == weights(whole)


@pytest.mark.usefixtures("python_handlers")
@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGINT, 2, 130), (signal.SIGTERM, 1, 143)])
def test_exit_codes_of_signals_and_the_second_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int, code: int
) -> None:
    monkeypatch.setattr(Console, "step", Signal(number, times=times).step)
    monkeypatch.setattr(Console, "notice", lambda self, text: None)
    done = invoke(config(world, tmp_path), "--json")
    assert done.exit_code == code
    assert "--resume" in json.loads(done.stdout)["error"]["fix"]
    assert (checkpoints.newest(tmp_path) is None) == (times == 2)


@pytest.mark.usefixtures("python_handlers")
def test_handlers_of_others_are_left_alone(world: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    assert train(config(world, tmp_path), Signal(signal.SIGTERM)).steps == 5
    assert seen == [signal.SIGTERM]


# --- beginning anew ---------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> None:
    (folder / "training_state.json").write_bytes((folder / "training_state.json").read_bytes()[:-1])


def test_only_broken_checkpoints_are_an_error_unless_restarted(world: Path, whole: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, save_every=2)
    train(config(world, tmp_path, save_every=2, learning_rate=1e-3))
    for folder in checkpoints.numbered(tmp_path):
        spoil(folder)
    before = content(tmp_path)
    done = invoke(settings, "--resume")
    assert done.exit_code == 1
    assert f"none of the checkpoints in {tmp_path} is intact (checkpoint-4, checkpoint-5)" in done.stderr
    assert "begin anew with --restart" in done.stderr
    assert content(tmp_path) == before
    interrupted(trainer(settings), 1, resume=True, restart=True)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]  # nothing of the earlier run
    assert train(settings, resume=True).resumed_from == 0
    assert losses(tmp_path) == losses(whole)
    assert weights(tmp_path) == weights(whole)


def test_restart_resumes_what_is_intact_only_with_resume(world: Path, whole: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path, save_every=2)
    train(settings)
    spoil(tmp_path / "checkpoint-5")
    assert train(settings, resume=True, restart=True).resumed_from == 4
    assert train(settings, restart=True).resumed_from == 0
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("name", ["checkpoint-500", "adapter"])
def test_restart_removes_nothing_of_others(world: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "trainer_state.json").write_text("{}")
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "training_state.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{name} is not of a training run here; move it away"):
        train(config(world, tmp_path), restart=True)
    assert content(tmp_path) == before


def test_a_broken_checkpoint_of_a_later_step_displaces_none(world: Path, tmp_path: Path) -> None:
    train(config(world, tmp_path, save_every=2))
    os.rename(tmp_path / "checkpoint-5", tmp_path / "checkpoint-50")
    spoil(tmp_path / "checkpoint-50")
    assert train(config(world, tmp_path, keep_checkpoints=1), resume=True).resumed_from == 4
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-5"
