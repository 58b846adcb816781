"""Links, pipes and swaps in a pool's directory: nothing outside of it is read, whatever happens in between."""

from __future__ import annotations

import os
import runpy
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft import AdapterLoadError, AdapterPool
from fastpeft.config.base import CONFIG_NAME
from fastpeft.files import safetensors
from fastpeft.files.checks import AdapterFileError, Confined, open_regular
from fastpeft.pool import files as pool_files
from fastpeft.saving.folder import SAFETENSORS_NAME, load_adapter_file
from torch import Tensor

Net = runpy.run_path(str(Path(__file__).with_name("hostile_tools.py")))["Net"]
FILES = (CONFIG_NAME, SAFETENSORS_NAME)
LEAVES = "a link in this path leaves the folder"


def make(folder: Path, value: float) -> Path:
    """An adapter whose tensors all have one value."""
    model = fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(target_modules=["up", "down"], r=4, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(value)
    model.save_pretrained(folder)
    (folder / "fastpeft_manifest.json").unlink()
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory of two adapters with ones; an adapter with twos lies outside."""
    make(tmp_path / "in" / "mine", 1.0)
    shutil.copytree(tmp_path / "in" / "mine", tmp_path / "in" / "other")
    make(tmp_path / "out", 2.0)
    return tmp_path / "in"


def values(pool: AdapterPool, name: str) -> set[float]:
    with pool.acquire(name) as slot:
        found: list[Tensor] = [
            s.a[int(s.starts[slot]) : int(s.starts[slot]) + 4] for s in pool._buffers.stacks.values()
        ]
        return {float(v) for tensor in found for v in tensor.unique()}


def refused(pool: AdapterPool, name: str, message: str) -> None:
    with pytest.raises(AdapterLoadError, match=message):
        pool.acquire(name)


@pytest.mark.parametrize("name", [*FILES, "fastpeft_manifest.json"])
@pytest.mark.parametrize("how", ["absolute", "relative", "through a link inside", "to a device", "to nothing"])
def test_a_file_that_is_a_link_out_of_the_directory_is_refused(root: Path, name: str, how: str) -> None:
    file, target = root / "mine" / name, root.parent / "out" / name
    file.unlink(missing_ok=True)
    target.touch()
    if how == "through a link inside":
        (root / "other" / "stop").symlink_to(target)
        target = root / "other" / "stop"
    links = {"relative": "../../out/" + name, "to a device": "/dev/zero", "to nothing": "/nothing/there"}
    file.symlink_to(links.get(how, target))
    pool = AdapterPool(Net(), root, max_resident=1)
    assert pool.names() == ["mine", "other"]
    if name in FILES:
        refused(pool, "mine", LEAVES)
        assert values(pool, "other") == {1.0}
    else:  # of no effect but a warning
        with pytest.warns(UserWarning, match=LEAVES):
            pool._read(pool.registry.get("mine").folder)


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "mine" / SAFETENSORS_NAME).rename(root / "mine" / "first")
    (root / "mine" / SAFETENSORS_NAME).symlink_to("first")
    (root / "other" / CONFIG_NAME).unlink()
    (root / "other" / CONFIG_NAME).symlink_to(root / "mine" / CONFIG_NAME)
    (root / "third").symlink_to("other")
    (root.parent / "alias").symlink_to(root)  # the directory itself may be one: the operator named it
    for directory in (root, root.parent / "alias"):
        pool = AdapterPool(Net(), directory, max_resident=1)
        assert [values(pool, name) for name in ("mine", "other", "third")] == [{1.0}] * 3


def test_added_folders_hold_what_is_read(root: Path) -> None:
    """One inside of the directory may have links in it, one elsewhere links in itself."""
    pool = AdapterPool(Net(), root, max_resident=1)
    shutil.copytree(root.parent / "out", root.parent / "out2")
    (root.parent / "out2" / SAFETENSORS_NAME).unlink()
    (root.parent / "out2" / SAFETENSORS_NAME).symlink_to(root.parent / "out" / SAFETENSORS_NAME)
    (root / "deep" / "er").mkdir(parents=True)
    for name in FILES:
        (root / "deep" / "er" / name).symlink_to(root / "mine" / name)
    pool.add("out", root.parent / "out")
    pool.add("out2", root.parent / "out2")
    pool.add("er", root / "deep" / "er")
    assert values(pool, "out") == {2.0}
    refused(pool, "out2", LEAVES)
    assert values(pool, "er") == {1.0}


def test_models_still_load_through_links(root: Path) -> None:
    """As the Hub's cache has them."""
    (root.parent / "snapshot").mkdir()
    for name in FILES:
        (root.parent / "snapshot" / name).symlink_to(root.parent / "out" / name)
    _, state = load_adapter_file(root.parent / "snapshot")
    assert {float(v) for t in state.values() for v in t.unique()} == {2.0}


def swap_file(root: Path) -> None:
    os.replace(root / "mine" / SAFETENSORS_NAME, root.parent / "kept")
    (root / "mine" / SAFETENSORS_NAME).symlink_to(root.parent / "out" / SAFETENSORS_NAME)


def swap_folder(root: Path) -> None:
    os.replace(root / "mine", root.parent / "kept")
    (root / "mine").symlink_to(root.parent / "out")


@pytest.mark.parametrize("swap", [swap_file, swap_folder])
def test_a_swap_between_check_and_use_gets_nothing(root: Path, monkeypatch: Any, swap: Callable[[Path], None]) -> None:
    pool = AdapterPool(Net(), root, max_resident=1)
    found: list[str] = []
    realpath = os.path.realpath

    def then_swap(path: Any, **options: Any) -> Any:
        place = realpath(path, **options)
        if str(place).endswith(SAFETENSORS_NAME) and not found:
            swap(root)
            found.append(place)
        return place

    monkeypatch.setattr(os.path, "realpath", then_swap)
    with pytest.raises(AdapterFileError, match="changed while it was opened"):
        pool_files._read(pool.registry.get("mine").folder, pool._selector, pool._buffers, pool._prompts)
    assert found
    monkeypatch.undo()
    pool.rescan()
    if swap is swap_folder:
        assert pool.registry.refused.keys() == {"mine"}
    else:
        refused(pool, "mine", LEAVES)


def test_somebody_who_swaps_all_the_time(root: Path) -> None:
    ended = threading.Event()
    inside, outside = root / "mine" / SAFETENSORS_NAME, root.parent / "out" / SAFETENSORS_NAME
    shutil.copy(inside, root / "sound")

    def attack() -> None:
        spare = root / "spare"
        while not ended.is_set():
            spare.symlink_to(outside)
            os.replace(spare, inside)
            shutil.copy(root / "sound", spare)
            os.replace(spare, inside)

    attacker = threading.Thread(target=attack)
    attacker.start()
    path, seen = Confined(inside, root.resolve()), {"1.0": 0, "refused": 0}
    try:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            try:
                tensors = safetensors.read_tensors(safetensors.read_header(path))
            except (AdapterFileError, FileNotFoundError):
                seen["refused"] += 1
                continue
            for value in {float(v) for tensor in tensors.values() for v in tensor.unique()}:
                seen[str(value)] = seen.get(str(value), 0) + 1
    finally:
        ended.set()
        attacker.join()
    assert seen.keys() == {"1.0", "refused"}  # nothing of outside
    assert min(seen.values()) > 0


@pytest.mark.parametrize("confined", [True, False])
def test_what_is_no_file_is_not_waited_for(root: Path, confined: bool) -> None:
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(root / "socket"))
        for name in ("pipe", "folder", "socket"):
            path = root.resolve() / name
            begin = time.monotonic()
            with pytest.raises(AdapterFileError, match="not a regular file"):
                open_regular(Confined(path, root.resolve()) if confined else path)
            assert time.monotonic() - begin < 1


def test_a_file_cut_short_while_its_header_is_read_is_no_crash(root: Path, monkeypatch: Any) -> None:
    """The library maps what it opens into memory, and a map of a file that shrinks is a SIGBUS."""
    import safetensors as library

    path, opened = root / "mine" / SAFETENSORS_NAME, library.safe_open
    size = path.stat().st_size

    def cut(*args: Any, **options: Any) -> Any:
        os.truncate(path, 0)
        return opened(*args, **options)

    monkeypatch.setattr(library, "safe_open", cut)
    header = safetensors.read_header(path)
    assert sum(t.nbytes for t in header.tensors.values()) < size
    with pytest.raises(AdapterFileError, match="changed while it was read"):
        safetensors.read_tensors(header)


def test_headers_where_there_is_no_proc(root: Path, monkeypatch: Any) -> None:
    path = root / "mine" / SAFETENSORS_NAME
    with_memory = safetensors.read_header(path)
    monkeypatch.delattr(os, "memfd_create")
    assert safetensors.read_header(path).begins == with_memory.begins
