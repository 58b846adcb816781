"""A run's output: one run at a time, places that cannot be written, leftovers of killed runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastpeft.apps.cli.app import app
from fastpeft.apps.training.config import TrainConfig, from_dict
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.output import OWNER_NAME, held
from fastpeft.apps.training.testing import make_tiny_model, write_jsonl
from typer.testing import CliRunner


def config(output: Path, **changes: Any) -> TrainConfig:
    return from_dict({"model": "no-model", "data": "no-data", "output": str(output), **changes})


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process that holds the output `tmp_path/out`; its id."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with held(config(tmp_path / "out")):
                os.write(write, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    yield pid
    with suppress(ProcessLookupError):  # the test has ended it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_run_is_refused_and_writes_nothing(tmp_path: Path, holder: int) -> None:
    model, data = make_tiny_model(tmp_path / "model", layers=1), write_jsonl(tmp_path / "data.jsonl", 4)
    before = content(tmp_path)
    words = [f"model={model}", f"data={data}", f"output={tmp_path / 'out'}"]
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 1
    assert f"output: {tmp_path / 'out'} is in use by another training run, process {holder} on " in done.stderr
    assert content(tmp_path) == before
    # also where an adapter of another run has it for its output
    several = config(tmp_path, data="", adapters={"out": {"data": str(data)}})
    message = rf"/out is in use .* process {holder} on \S+ since \d+-\d\d-\d\d"
    with pytest.raises(UserError, match=message), held(several):
        pytest.fail("held twice")


def test_the_lock_of_a_killed_process_holds_nothing(tmp_path: Path, holder: int) -> None:
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (tmp_path / "out" / OWNER_NAME).exists()  # what a crash leaves
    with held(config(tmp_path / "out")):
        owner = json.loads((tmp_path / "out" / OWNER_NAME).read_text())
        assert owner["pid"] == os.getpid()
    assert os.listdir(tmp_path / "out") == []


def test_a_file_system_without_locks_gets_one_by_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: limited(errno.ENOSYS))
    read, write = os.pipe()
    warnings.simplefilter("ignore")  # filelock's, that it does so; pytest puts the filters back
    with held(config(tmp_path)):
        pid = os.fork()
        if pid == 0:
            try:
                with held(config(tmp_path)):
                    os.write(write, b"held")
            except UserError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert f"is in use by another training run, process {os.getpid()} on" in os.read(read, 1000).decode()
    assert os.listdir(tmp_path) == []


def limited(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_another_thread_is_refused_and_the_same_one_may_hold_again(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def hold() -> None:
        with held(config(tmp_path)):
            pass

    with held(config(tmp_path)):
        hold()
        with ThreadPoolExecutor(1) as threads, pytest.raises(UserError, match=f"process {os.getpid()} on"):
            threads.submit(hold).result()
        assert (tmp_path / OWNER_NAME).exists()
    hold()


@pytest.mark.parametrize("where", ["file", "file/below", "loop", "nowhere", "/proc/nope", "/proc", "x" * 300, "a\0b"])
def test_outputs_that_cannot_be_are_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"^output: .*; choose a folder"), held(config(tmp_path / where)):
        pytest.fail("held")
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "nowhere"]


@pytest.mark.parametrize("name", ["adapter", "metrics.jsonl", "loss.png"])
def test_what_stands_where_a_result_goes_is_found_before_training(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine") if name == "adapter" else (tmp_path / name).mkdir()
    message = f"output: .*{name} is a f.*is to be written there; move it away"
    with pytest.raises(UserError, match=message), held(config(tmp_path)):
        pytest.fail("held")


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    pid = os.fork()  # root may write anywhere, so as somebody else
    if pid == 0:
        code = 1
        try:
            os.chmod(tmp_path, 0o555)
            if os.getuid() == 0:
                for folder in tmp_path.parents:
                    if os.stat(folder).st_uid == 0 and folder.name.startswith("pytest"):
                        os.chmod(folder, 0o755)
                os.setuid(65534)
            try:
                with held(config(tmp_path)):
                    pass
            except UserError as error:
                code = 0 if str(error).startswith(f"output: {tmp_path} cannot be written (Permission denied") else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_leftovers_of_killed_runs_go_and_files_of_users_stay(tmp_path: Path) -> None:
    end = f"tmp-elsewhere-{os.getpid()}-0123abcd"
    ours = [f".checkpoint-15.{end}", f"..checkpoint-15.{end}.{end}", f".adapter.{end}"]
    mine = [f".notes.{end}", "checkpoint-15.tmp", ".checkpoint-15.tmp-mine", f"notes.jsonl.{end}", ".checkpoint-x"]
    for name in ours + mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    files = ["metrics.jsonl.tmp-12-0123abcd", "loss.png.tmp-12-0123abcd", f"{OWNER_NAME}.tmp-12-0123abcd"]
    others = ["notes.txt.tmp-12-0123abcd", "metrics.jsonl.tmp-12", "metricsXjsonl.tmp-12-0123abcd"]
    for name in files + others:
        (tmp_path / name).touch()
    with held(config(tmp_path)):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, *others])
