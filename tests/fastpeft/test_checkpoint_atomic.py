"""Adapter folders are written whole or not at all, and a manifest tells whether one is still whole."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fastpeft.config.base import CONFIG_NAME
from fastpeft.files import atomic
from fastpeft.files.checks import AdapterFileError
from fastpeft.saving.folder import SAFETENSORS_NAME, load_adapter_file, save_adapter


def adapter(value: float) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """A plausible adapter, different in every file for different values."""
    key = "base_model.model.up.lora_{}.weight"
    tensors = {key.format("A"): torch.full((2, 8), value), key.format("B"): torch.full((8, 2), value)}
    return tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": value, "target_modules": ["up"]}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_are_readable_by_others_and_have_a_manifest(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    assert {p.name for p in out.iterdir()} == {CONFIG_NAME, SAFETENSORS_NAME, atomic.MANIFEST_NAME}
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    atomic.verify_manifest(out)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_again_replaces_what_is_ours_and_keeps_the_rest(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    (out / "tokenizer.json").write_text("{}")
    (out / "other").mkdir()
    (out / "other" / "x").write_text("x")
    (out / "link").symlink_to("tokenizer.json")
    save_adapter(out, *adapter(2.0))
    assert json.loads((out / CONFIG_NAME).read_text())["lora_alpha"] == 2.0
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "other" / "x").read_text() == "x"
    assert os.readlink(out / "link") == "tokenizer.json"
    atomic.verify_manifest(out)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_keep_false_replaces_the_folder(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    with atomic.atomic_directory(out, keep=False) as folder:
        (folder / "x").write_text("new")
    assert {p.name for p in out.iterdir()} == {"x", atomic.MANIFEST_NAME}


def test_a_folder_inside_another_is_made_whole_with_it(tmp_path):
    with atomic.atomic_directory(tmp_path / "a") as folder:
        save_adapter(folder / "inner", *adapter(1.0))
        assert {p.name for p in (folder / "inner").iterdir()} == {CONFIG_NAME, SAFETENSORS_NAME}
        assert list(tmp_path.iterdir()) == [folder]
    atomic.verify_manifest(tmp_path / "a", [f"inner/{SAFETENSORS_NAME}"])
    weights = tmp_path / "a" / "inner" / SAFETENSORS_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=r"inner/adapter_model\.safetensors changed"):
        atomic.verify_manifest(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(NotADirectoryError), atomic.atomic_directory(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("exchange", [True, False])
def test_saving_into_the_current_folder(tmp_path, monkeypatch, exchange):
    """The folder that a process stands in keeps its identity."""
    save_adapter(tmp_path, *adapter(1.0))
    monkeypatch.chdir(tmp_path)
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    inode = tmp_path.stat().st_ino
    save_adapter(".", *adapter(2.0))
    assert tmp_path.stat().st_ino == inode
    assert json.loads(Path(CONFIG_NAME).read_text())["lora_alpha"] == 2.0
    atomic.verify_manifest(tmp_path)


@pytest.mark.parametrize("existing", [True, False])
def test_saving_onto_a_mount_point(tmp_path, monkeypatch, existing):
    """Nothing is written beside it (that is another file system), and the folder stays the one it is."""
    out = tmp_path / "a"
    out.mkdir()
    if existing:
        save_adapter(out, *adapter(1.0))
        (out / "keep").write_text("x")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: real(a, b) if out in Path(a).parents else pytest.fail(f"from {a}"))
    inode = out.stat().st_ino
    save_adapter(out, *adapter(2.0))
    assert out.stat().st_ino == inode
    atomic.verify_manifest(out)
    names = {CONFIG_NAME, SAFETENSORS_NAME, atomic.MANIFEST_NAME}
    assert {p.name for p in out.iterdir()} == names | ({"keep"} if existing else set())
    assert json.loads((out / CONFIG_NAME).read_text())["lora_alpha"] == 2.0


def test_without_exchange_files_are_replaced_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    (out / "keep").write_text("x")
    save_adapter(out, *adapter(2.0))
    assert json.loads((out / CONFIG_NAME).read_text())["lora_alpha"] == 2.0
    assert (out / "keep").read_text() == "x"
    atomic.verify_manifest(out)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


STEPS = ["write_manifest", "_sync_tree", "_sync", "_put_in_place", "_exchange", "_link_missing"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("existing", [True, False])
def test_an_error_at_any_step_leaves_the_old_folder(tmp_path, monkeypatch, step, existing):
    out = tmp_path / "a"
    if existing:
        save_adapter(out, *adapter(1.0))
    elif step in ("_exchange", "_link_missing"):
        pytest.skip("not called for a new folder")
    before = content(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(out, *adapter(2.0))
    assert content(tmp_path) == before


KILL = """
import os, signal, sys
from fastpeft.files import atomic
calls = 0
def tracer(frame, event, arg):
    global calls
    if event == "line" and frame.f_code.co_filename == atomic.__file__:
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    return tracer
import torch
from fastpeft.saving.folder import save_adapter
key = "base_model.model.up.lora_A.weight"
sys.settrace(tracer)
save_adapter(sys.argv[1], {key: torch.full((2, 8), 2.0)}, {"peft_type": "LORA", "lora_alpha": 2.0})
sys.settrace(None)
print("lines", calls)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_line_leaves_one_whole_folder(tmp_path):
    """SIGKILL at lines spread over the whole of a save: the folder is always all old or all new."""
    command = [sys.executable, "-c", textwrap.dedent(KILL)]
    old, new = tmp_path / "old", tmp_path / "new"
    key = "base_model.model.up.lora_A.weight"
    save_adapter(old, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
    save_adapter(new, {key: torch.full((2, 8), 2.0)}, {"peft_type": "LORA", "lora_alpha": 2.0})
    out = tmp_path / "run" / "a"
    save_adapter(out, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
    done = subprocess.run([*command, str(out), "-1"], capture_output=True, text=True, check=True)
    lines = int(done.stdout.split()[-1])
    seen = set()
    for at in sorted({1 + i * (lines - 1) // 7 for i in range(8)}):
        save_adapter(out, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
        died = subprocess.run([*command, str(out), str(at)], capture_output=True, text=True, check=False)
        assert died.returncode == -signal.SIGKILL
        found = content(out)
        assert found in (content(old), content(new))
        seen.add(found == content(new))
    assert seen == {True, False}  # the kills fell on both sides of the commit
    save_adapter(out, {key: torch.full((2, 8), 1.0)}, {"peft_type": "LORA", "lora_alpha": 1.0})
    assert [p.name for p in out.parent.iterdir()] == ["a"]  # what the dead processes left is gone


def test_leftovers_of_living_writers_stay(tmp_path):
    mine = tmp_path / f".a.tmp-{atomic._host()}-{os.getpid()}-0123abcd"
    other = tmp_path / ".a.tmp-elsewhere-1-0123abcd"
    mine.mkdir()
    other.mkdir()
    save_adapter(tmp_path / "a", *adapter(1.0))
    assert mine.exists()
    assert other.exists()


# --- manifests --------------------------------------------------------------------------------------------------------


def test_newest_valid_passes_over_what_is_broken(tmp_path):
    for step in (5, 10, 40, 100, 200):
        save_adapter(tmp_path / f"checkpoint-{step}", *adapter(float(step)))
    assert atomic.newest_valid(tmp_path).name == "checkpoint-200"
    (tmp_path / "checkpoint-200" / atomic.MANIFEST_NAME).unlink()
    weights = tmp_path / "checkpoint-100" / SAFETENSORS_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    changed = bytearray((tmp_path / "checkpoint-40" / SAFETENSORS_NAME).read_bytes())
    changed[-1] ^= 1
    (tmp_path / "checkpoint-40" / SAFETENSORS_NAME).write_bytes(changed)
    (tmp_path / "checkpoint-x").mkdir()
    assert atomic.newest_valid(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / CONFIG_NAME).unlink()
    assert atomic.newest_valid(tmp_path).name == "checkpoint-5"
    (tmp_path / "checkpoint-5" / atomic.MANIFEST_NAME).write_text("{")
    assert atomic.newest_valid(tmp_path) is None
    assert atomic.newest_valid(tmp_path / "missing") is None


def test_a_manifest_cannot_point_outside(tmp_path):
    out = tmp_path / "a"
    save_adapter(out, *adapter(1.0))
    (out / atomic.MANIFEST_NAME).write_text(json.dumps({"files": {"../secret": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(AdapterFileError, match="leaves its folder"):
        atomic.verify_manifest(out)


def test_files_that_changed_since_load_with_a_warning(tmp_path):
    """PEFT may have saved into the folder since: what it holds counts, and the manifest is reported as stale."""
    save_adapter(tmp_path, *adapter(1.0))
    (tmp_path / "b").mkdir()
    save_adapter(tmp_path / "b", *adapter(2.0))
    os.replace(tmp_path / "b" / SAFETENSORS_NAME, tmp_path / SAFETENSORS_NAME)
    with pytest.warns(UserWarning, match="changed since"):
        _, state = load_adapter_file(tmp_path)
    assert float(next(iter(state.values()))[0, 0]) == 2.0
