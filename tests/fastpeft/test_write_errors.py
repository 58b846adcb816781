"""Saving for which there is no room: the error says so, what was there is whole, and nothing temporary stays."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from fastpeft.files import atomic
from fastpeft.files.atomic import atomic_directory, atomic_file, write_text
from fastpeft.files.write_errors import WriteError
from fastpeft.recipes.layers_of import save_tensors
from fastpeft.saving.folder import save_adapter
from safetensors import SafetensorError

TENSORS = {"base_model.model.up.lora_A.weight": torch.zeros(64, 64)}
CONFIG = {"peft_type": "LORA", "r": 64}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fail(writing: AbstractContextManager[Path], error: Exception) -> None:
    """Begin to write, and raise."""
    with writing as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("new")
        raise error


def system(code: int) -> OSError:
    return OSError(code, os.strerror(code), "x")


def rust(code: int) -> SafetensorError:
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")


CODES = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "quota", errno.EFBIG: "ulimit -f", errno.EMFILE: "ulimit -n",
    errno.ENFILE: "the system has too many files", errno.EROFS: "read-only",
}  # fmt: skip


@pytest.mark.parametrize("make", [system, rust])
@pytest.mark.parametrize("code", CODES)
def test_errors_are_named_as_what_they_are(tmp_path: Path, code: int, make: Callable[[int], Exception]) -> None:
    save_adapter(tmp_path / "a", TENSORS, CONFIG)
    write_text(tmp_path / "text", "old")
    before = content(tmp_path)
    for write, name in ((atomic_directory, "a"), (atomic_file, "text")):
        with pytest.raises(WriteError, match=CODES[code]) as caught:
            fail(write(tmp_path / name), make(code))
        assert caught.value.errno == code
        assert str(caught.value).startswith(f"cannot write {tmp_path / name}: ")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.errno, str(again)) == (code, str(caught.value))
        assert content(tmp_path) == before
        assert sorted(os.listdir(tmp_path)) == ["a", "text"]


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), ValueError("No space left on device"), KeyError("x")])
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    for write in (atomic_directory, atomic_file):
        with pytest.raises(type(error)) as caught:
            fail(write(tmp_path / "a"), error)
        assert caught.value is error


LIMITED = """
import json, os, resource, sys
import torch
from pathlib import Path
from fastpeft.files.atomic import write_text
from fastpeft.recipes.layers_of import save_tensors
from fastpeft.saving.folder import save_adapter

def outcome(work):
    try:
        work()
        return None
    except BaseException as error:
        return [type(error).__name__, error.errno, str(error)]

root, found = Path(sys.argv[1]), {}
large = {"base_model.model.up.lora_A.weight": torch.ones(64, 64)}
works = {
    "adapter": lambda: save_adapter(root / "adapter", large, {"peft_type": "LORA", "r": 64}),
    "new": lambda: save_adapter(root / "new", large, {"peft_type": "LORA", "r": 64}),
    "tensors": lambda: save_tensors(str(root / "tensors"), large),
    "text": lambda: write_text(root / "text", "x" * 20000),
}
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
found["size"] = {name: outcome(work) for name, work in works.items()}
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
held = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
for free in range(8):  # fails at every place that opens a file, until all of them are free
    found[f"files{free}"] = {name: outcome(work) for name, work in works.items() if name == "adapter"}
    os.close(held.pop())
for handle in held:
    os.close(handle)
found["left"] = sorted(os.listdir(root))
print(json.dumps(found))
"""


def test_limits_of_the_process(tmp_path: Path) -> None:
    """RLIMIT_FSIZE (a write fails as it does on a full disk) and RLIMIT_NOFILE, for all that writes."""
    save_adapter(tmp_path / "adapter", TENSORS, CONFIG)
    save_tensors(str(tmp_path / "tensors"), TENSORS)
    write_text(tmp_path / "text", "old")
    before = content(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("left") == ["adapter", "tensors", "text"]
    for name, (kind, code, message) in found.pop("size").items():
        assert (kind, code) == ("WriteError", errno.EFBIG), (name, message)
        assert message.startswith(f"cannot write {tmp_path / name}: a file would be larger"), message
    outcomes = [each["adapter"] for each in found.values()]
    failed = [each for each in outcomes if each is not None]
    assert outcomes == [*failed, *[None] * (len(outcomes) - len(failed))]
    assert len(failed) in range(2, len(outcomes))
    assert all(each[:2] == ["WriteError", errno.EMFILE] for each in failed), failed
    del before["adapter/adapter_model.safetensors"], before["adapter/fastpeft_manifest.json"]
    assert before.items() <= content(tmp_path).items()
    atomic.verify_manifest(tmp_path / "adapter")
