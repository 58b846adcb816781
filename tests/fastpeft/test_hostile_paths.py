"""Names, paths and kinds of files that must not be used: a clear error, the model as it was."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

import fastpeft
import pytest
import torch
from fastpeft.config.base import CONFIG_NAME
from fastpeft.config.limits import check_adapter_name
from fastpeft.files.checks import AdapterFileError, path_inside
from fastpeft.files.safetensors import read_header
from fastpeft.saving.folder import SAFETENSORS_NAME
from safetensors.torch import load_file

tools = runpy.run_path(str(Path(__file__).with_name("hostile_tools.py")))
good = tools["good"]
folder = tools["folder"]
CONFIG = tools["CONFIG"]
ERRORS = tools["ERRORS"]
KEY = tools["KEY"]
Net = tools["Net"]
entry = tools["entry"]
quick = tools["quick"]
refuse = tools["refuse"]
snapshot = tools["snapshot"]
write_raw = tools["write_raw"]


def test_pipes_and_devices_are_not_read(folder):
    for name in (SAFETENSORS_NAME, CONFIG_NAME):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refuse(folder, "not a regular file|Can't find")
    (folder / CONFIG_NAME).unlink()
    (folder / CONFIG_NAME).symlink_to("/dev/zero")
    refuse(folder, "not a regular file|Can't find")
    (folder / CONFIG_NAME).unlink()
    (folder / CONFIG_NAME).mkdir()
    refuse(folder, "not a regular file|Can't find")


@pytest.mark.parametrize("missing", [CONFIG_NAME, SAFETENSORS_NAME])
def test_missing_files(folder, missing):
    (folder / missing).unlink()
    refuse(folder, missing)


@pytest.mark.parametrize("subfolder", ["..", "../a", "x/../../a", "/etc", "link"])
def test_subfolders_stay_inside(folder, subfolder):
    inner = folder / "inner"
    shutil.copytree(folder, inner)
    (inner / "link").symlink_to(folder.parent)
    refuse(inner, "leaves its folder", subfolder=subfolder)


@pytest.mark.parametrize("name", ["no/such/folder", "../x", "", "a" * 5000, "-x/y", "x/..", "C:\\x"])
def test_names_that_are_no_folder(name):
    model = Net()
    before = snapshot(model)
    with quick(), pytest.raises(ERRORS):
        fastpeft.PeftModel.from_pretrained(model, name)
    assert snapshot(model) == before


def test_a_file_is_no_folder(folder):
    refuse(folder / SAFETENSORS_NAME, "folder was expected|neither|Can't find")


NAMES = ["default/x", "../x", "a.b", "", "x" * 65, "a ", "ä", "a\n", "a\0", ".", "..", "/", "a/", 7, None, b"a",
         "__base__"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_adapter_names_with_anything_else_in_them(folder, name):
    with pytest.raises(AdapterFileError, match="adapter name"):
        check_adapter_name(name)
    model = Net()
    before = snapshot(model)
    with pytest.raises((AdapterFileError, TypeError)):
        fastpeft.PeftModel.from_pretrained(model, folder, adapter_name=name)
    assert snapshot(model) == before
    with pytest.raises((AdapterFileError, TypeError)):
        fastpeft.get_peft_model(model, fastpeft.LoraConfig(**CONFIG), adapter_name=name)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["a", "train", "keys", "weight", "_modules", "x" * 64, "0", "-", "__init__", "A-b_9"])
def test_every_permitted_adapter_name_works(folder, name, tmp_path):
    model = fastpeft.PeftModel.from_pretrained(Net(), folder, adapter_name=name)
    model.save_pretrained(tmp_path / "out")
    expected = load_file(folder / SAFETENSORS_NAME)
    found = load_file(tmp_path / "out" / name / SAFETENSORS_NAME)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_path_inside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    assert path_inside(tmp_path / "in", "x") == tmp_path / "in" / "x"
    for bad in ("..", "../in2", "out", "out/x", "/", "x/../.."):
        with pytest.raises(AdapterFileError):
            path_inside(tmp_path / "in", bad)


def test_a_large_honest_header_is_quick(tmp_path):
    """46 thousand tensors: LoRA on every expert of a large mixture."""
    names = [f"base_model.model.model.layers.{i // 768}.mlp.experts.{i % 768}.x.lora_A.weight" for i in range(46080)]
    header = {name: entry([1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    write_raw(tmp_path / "x", header, b"0" * (4 * len(names)))
    with quick(5.0):  # half a second; a loop within the loop would take minutes
        assert len(read_header(tmp_path / "x").tensors) == len(names)
