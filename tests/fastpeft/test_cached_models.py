"""Quantised models that are kept: opened as they were made, made again when they have to be, never by halves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.apps.training import models
from fastpeft.apps.training.errors import UserError
from fastpeft.files.checks import AdapterFileError
from fastpeft.files.write_errors import WriteError
from fastpeft.weights import cached
from fastpeft.weights.cached import NOTE_NAME, load_cached_model
from fastpeft.weights.quantize import quantize_model

from peft_kernels.testing import assert_same_bits

from .families_tools import tiny
from .test_streaming_load import IDS, NORM, SHARD, llama, same, shard_of

transformers = pytest.importorskip("transformers")
BF16 = torch.bfloat16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(tie=True).save_pretrained(tmp_path / "dense", max_shard_size=SHARD)
    return tmp_path / "dense"


def opened(folder: Path, **arguments: Any) -> tuple[Any, str]:
    """(the model, what was said)."""
    lines: list[str] = []
    model = load_cached_model(folder, folder.parent / "kept", say=lines.append, **arguments)
    return model, "; ".join(lines)


@pytest.mark.parametrize("settings", [{}, {"quant_type": "fp4", "double_quant": False, "skip": []}])
@pytest.mark.parametrize("tie", [False, True])
def test_it_is_kept_and_opened(tmp_path: Path, tie: bool, settings: dict[str, Any]) -> None:
    llama(tie=tie, bias=True).to(BF16).save_pretrained(tmp_path / "dense", max_shard_size=SHARD)
    made, said = opened(tmp_path / "dense", settings=settings)
    assert said == f"quantising {tmp_path / 'dense'}; kept the quantised model in {tmp_path / 'kept'}"
    found, said = opened(tmp_path / "dense", settings=settings)
    assert said == f"opened the quantised model in {tmp_path / 'kept'}"
    want = quantize_model(type(made).from_pretrained(tmp_path / "dense"), **settings)
    same(made, want)
    same(found, want)
    assert found.dtype == want.dtype
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tie
    assert found.name_or_path == want.name_or_path == str(tmp_path / "dense")
    assert_same_bits(found(IDS).logits, want(IDS).logits)


def test_experts_are_kept(tmp_path: Path) -> None:
    dense = tiny("mixtral")
    dense.save_pretrained(tmp_path / "dense")
    made, _ = opened(tmp_path / "dense", settings={"experts": True})
    found, said = opened(tmp_path / "dense", settings={"experts": True})
    assert said.startswith("opened")
    assert_same_bits(found(IDS).logits, made(IDS).logits)


def test_a_mapped_model_trains_and_is_written_to_in_this_process_alone(folder: Path) -> None:
    opened(folder)
    files = {file: file.read_bytes() for file in (folder.parent / "kept").iterdir()}
    model, _ = opened(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = fastpeft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    model = fastpeft.get_peft_model(model, config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    model.get_base_model().model.norm.weight.data.zero_()
    assert {file: file.read_bytes() for file in (folder.parent / "kept").iterdir()} == files
    again, _ = opened(folder)
    for key, value in again.state_dict().items():
        assert_same_bits(value, before[key])


def changed_time(folder: Path) -> None:
    os.utime(shard_of(folder, NORM), (1, 1))


def changed_config(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))


def cut(folder: Path) -> None:
    file = folder.parent / "kept" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def no_note(folder: Path) -> None:
    (folder.parent / "kept" / NOTE_NAME).write_text("{")


def older(folder: Path) -> None:
    note = folder.parent / "kept" / NOTE_NAME
    note.write_text(json.dumps({**json.loads(note.read_text()), "version": 0}))


AGAIN = {
    "time": (changed_time, {}, "the source changed (model-"), "config": (changed_config, {}, "config changed"),
    "settings": (lambda f: None, {"settings": {"double_quant": False}}, "settings changed"),
    "dtype": (lambda f: None, {"dtype": BF16}, "dtype changed"), "cut": (cut, {}, "it cannot be read: "),
    "note": (no_note, {}, "not valid json"), "version": (older, {}, "another version"),
}  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
def test_it_is_made_again(folder: Path, name: str) -> None:
    change, arguments, why = AGAIN[name]
    opened(folder)
    change(folder)
    model, said = opened(folder, **arguments)
    assert f"{folder.parent / 'kept'} is made again: " in said
    assert why in said
    same(opened(folder, **arguments)[0], model)
    assert opened(folder, **arguments)[1].startswith("opened")


def test_a_broken_source_leaves_nothing(folder: Path) -> None:
    shard = shard_of(folder, NORM)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=shard.name):
        opened(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["dense"]


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cached, "write_tensors", full)
    with pytest.raises(WriteError, match="the disk is full"):
        opened(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["dense"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, cpu = models.Source(str(folder), "folder x"), torch.device("cpu")
    with pytest.raises(UserError, match="the disk is full") as told:
        models.load_base(source, torch.float32, cpu, "nf4", {}, cache=True)
    assert "cache_quantized" in told.value.fix
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.undo()
    opened(folder)
    kept = sorted((folder.parent / "kept").iterdir())
    monkeypatch.setattr(cached, "write_tensors", full)
    with pytest.raises(WriteError):  # the old one stays
        opened(folder, dtype=BF16)
    assert sorted((folder.parent / "kept").iterdir()) == kept
    assert opened(folder)[1].startswith("opened")


def test_programs_keep_and_open(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, cpu = models.Source(str(folder), "folder x"), torch.device("cpu")
    lines: list[str] = []
    pair = [models.load_base(source, BF16, cpu, "nf4", {}, cache=True, say=lines.append) for _ in range(2)]
    same(*pair)
    assert [line.split()[0] for line in lines] == ["quantising", "kept", "opened"]
    assert not any(p.requires_grad for p in pair[1].parameters())
