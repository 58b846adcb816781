"""`.bin` files: written as PEFT writes them, read only where that is allowed, and then by another process."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import signal
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.files import bins
from fastpeft.files.checks import AdapterFileError
from fastpeft.saving.folder import PICKLE_NAME, SAFETENSORS_NAME, convert_bin, open_adapter
from safetensors.torch import load_file

tools = runpy.run_path(str(Path(__file__).with_name("hostile_tools.py")))
good, folder = tools["good"], tools["folder"]
KEY, Net, refuse = tools["KEY"], tools["Net"], tools["refuse"]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole process may read `.bin` files, by a child that these tests share."""
    monkeypatch.setenv(bins.ALLOW_ENV, "1")


@contextmanager
def as_bin(folder: Path, content: Any = None) -> Iterator[dict[str, torch.Tensor]]:
    """The folder's tensors, in a pickle alone (or what else the pickle is to hold)."""
    tensors = load_file(folder / SAFETENSORS_NAME)
    (folder / SAFETENSORS_NAME).unlink()
    torch.save(tensors if content is None else content, folder / PICKLE_NAME)
    yield tensors


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_the_three_ways_to_read_one(folder: Path, kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with as_bin(folder) as tensors:
        children = set()
        for _ in range(2):
            model = fastpeft.PeftModel.from_pretrained(Net(), folder)
            assert torch.equal(fastpeft.get_peft_model_state_dict(model)[KEY], tensors[KEY])
            children.add(bins._kept.process.pid)
        assert len(children) == 1
    monkeypatch.delenv(bins.ALLOW_ENV)
    refuse(folder, "convert-bin .*allow_bin=True.* FASTPEFT_ALLOW_BIN=1")
    model = fastpeft.PeftModel.from_pretrained(Net(), folder, allow_bin=True)
    assert torch.equal(fastpeft.get_peft_model_state_dict(model)[KEY], tensors[KEY])
    assert convert_bin(folder) == len(tensors)
    assert (folder / PICKLE_NAME).exists()
    assert load_file(folder / SAFETENSORS_NAME).keys() == tensors.keys()
    assert torch.equal(open_adapter(folder).read()[KEY], tensors[KEY])
    with pytest.raises(FileExistsError, match="nothing to convert"):
        convert_bin(folder)


def test_a_prompt_starts_from_one(tmp_path: Path, kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.prompts.multitask_prompt_tuning import MultitaskPromptEmbedding

    prompt = {"prompt_embeddings": torch.randn(2, 4)}
    torch.save(prompt, tmp_path / PICKLE_NAME)
    config = fastpeft.MultitaskPromptTuningConfig(
        num_virtual_tokens=2, token_dim=4, num_transformer_submodules=1, prompt_tuning_init="ONLY_SOURCE_SHARED",
        prompt_tuning_init_state_dict_path=str(tmp_path / PICKLE_NAME),
    )  # fmt: skip
    made = MultitaskPromptEmbedding(config, None)
    assert torch.equal(made.embedding.weight, prompt["prompt_embeddings"])
    monkeypatch.delenv(bins.ALLOW_ENV)
    with pytest.raises(AdapterFileError, match=r"convert-bin .* FASTPEFT_ALLOW_BIN=1"):
        MultitaskPromptEmbedding(config, None)


def test_the_command(folder: Path, kept: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from fastpeft.apps.cli import main

    with as_bin(folder) as tensors:
        monkeypatch.setattr(sys, "argv", ["fastpeft", "convert-bin", str(folder), "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(tensors)
    assert load_file(folder / SAFETENSORS_NAME).keys() == tensors.keys()


def test_what_is_written(folder: Path, tmp_path: Path) -> None:
    model = fastpeft.PeftModel.from_pretrained(Net(), folder)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="a pickle, which can run code"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / SAFETENSORS_NAME).exists()  # the older values, which a reader would take
    found = torch.load(tmp_path / PICKLE_NAME, weights_only=True)
    wanted = load_file(folder / SAFETENSORS_NAME)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.full_form
def test_peft_reads_it_and_the_other_way_round(folder: Path, tmp_path: Path, kept: None) -> None:
    peft = pytest.importorskip("peft")
    fastpeft.PeftModel.from_pretrained(Net(), folder).save_pretrained(tmp_path / "ours", safe_serialization=False)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    ours = fastpeft.PeftModel.from_pretrained(Net(), tmp_path / "theirs")
    wanted = load_file(folder / SAFETENSORS_NAME)
    for found in (peft.get_peft_model_state_dict(theirs), fastpeft.get_peft_model_state_dict(ours)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_pickles_are_refused_and_never_run(folder: Path, tmp_path: Path, kept: None) -> None:
    mark = tmp_path / "exploded"
    (folder / SAFETENSORS_NAME).unlink()
    torch.save({KEY: Bomb(mark)}, folder / PICKLE_NAME)
    refuse(folder, "not a file of tensors")
    (folder / PICKLE_NAME).write_bytes(pickle.dumps(Bomb(mark)))
    refuse(folder, "not a file of tensors")
    assert not mark.exists()
    with pytest.raises(AdapterFileError, match="not a file of tensors"):
        convert_bin(folder)
    assert not (folder / SAFETENSORS_NAME).exists()


def test_what_is_no_adapter(folder: Path, kept: None) -> None:
    wide = torch.zeros(1).expand(1 << 20, 1 << 20)
    with as_bin(folder, {KEY: wide}) as tensors:
        refuse(folder, "claim more")
        torch.save([1, 2], folder / PICKLE_NAME)
        refuse(folder, "dictionary of tensors")
        torch.save({**tensors, KEY: tensors[KEY].to_sparse()}, folder / PICKLE_NAME)
        refuse(folder, "dictionary of tensors")
        torch.save({**tensors, KEY: tensors[KEY] * float("nan")}, folder / PICKLE_NAME)
        refuse(folder, "NaN or infinite")
        torch.save(tensors, folder / PICKLE_NAME)  # and the child is still good for an honest one
        assert torch.equal(open_adapter(folder).read()[KEY], tensors[KEY])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited on Linux alone")
def test_memory_is_limited(folder: Path, kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip file of a few kB, whose tensor is 256 MiB of zeros once it is inflated."""
    monkeypatch.setattr(bins, "SPARE_BYTES", 128 << 20)
    with as_bin(folder, {KEY: torch.zeros(1)}) as tensors:
        plain = zipfile.ZipFile(folder / PICKLE_NAME)
        with zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
            for entry in plain.infolist():
                is_data = "/data/" in entry.filename
                bomb.writestr(entry.filename, bytes(256 << 20) if is_data else plain.read(entry))
        plain.close()
        os.replace(folder / "bomb", folder / PICKLE_NAME)
        assert (folder / PICKLE_NAME).stat().st_size < 4 << 20
        with pytest.raises(AdapterFileError, match="takes more memory"):
            open_adapter(folder)
        torch.save(tensors, folder / PICKLE_NAME)
        assert torch.equal(open_adapter(folder).read()[KEY], tensors[KEY])


@pytest.mark.full_form
def test_an_interrupt_leaves_no_child_that_waits_for_the_rest(
    folder: Path, kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with as_bin(folder) as tensors:
        with monkeypatch.context() as patched:
            patched.setattr(bins.shutil, "copyfileobj", stop)
            with pytest.raises(KeyboardInterrupt):
                open_adapter(folder)
        assert torch.equal(open_adapter(folder).read()[KEY], tensors[KEY])


@pytest.mark.full_form
def test_a_child_that_does_not_answer_is_ended(folder: Path, kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bins, "_SECONDS", 0.2)
    with as_bin(folder) as tensors:
        with bins._reader() as first:
            first.process.send_signal(signal.SIGSTOP)
        with pytest.raises(AdapterFileError, match="ended with code -9"):
            open_adapter(folder)
        monkeypatch.setattr(bins, "_SECONDS", 60)
        assert torch.equal(open_adapter(folder).read()[KEY], tensors[KEY])
        assert bins._kept.process.pid != first.process.pid
