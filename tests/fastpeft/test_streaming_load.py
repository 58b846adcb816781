"""Folders of dense weights that are quantised tensor by tensor while they are read: the same bytes as `quantize_model`
makes of the loaded model, in the memory of the finished one, and errors that name the broken file."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.apps.training import models
from fastpeft.apps.training.errors import UserError
from fastpeft.files.checks import AdapterFileError
from fastpeft.files.mapped import MappedFiles
from fastpeft.files.safetensors import map_tensors, read_header, write_tensors
from fastpeft.weights.nf4_linear import NF4Linear
from fastpeft.weights.quantize import nf4_config, quantize_model
from fastpeft.weights.streaming import Streaming
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kernels.testing import assert_same_bits
from tests.tools.forms import matrix

from .families_tools import tiny
from .streaming_tools import measured

transformers = pytest.importorskip("transformers")
SHARD = "20KB"
IDS = torch.arange(24).reshape(2, 12)


def llama(tie: bool = False, bias: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": tie, "attention_bias": bias, **options,
    })  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config).eval()


def same(found: nn.Module, want: nn.Module) -> None:
    """Two models are the same: classes, keys, bits, what wants gradients, what is in training."""
    modules = dict(want.named_modules())
    assert dict(found.named_modules()).keys() == modules.keys()
    for name, one in found.named_modules():
        other = modules[name]
        assert (type(one), one.training) == (type(other), other.training), name
        assert one._non_persistent_buffers_set == other._non_persistent_buffers_set, name
        for key, tensor in one.named_buffers(recurse=False):
            assert_same_bits(tensor, other._buffers[key])
    for (name, one), (_, other) in zip(found.named_parameters(), want.named_parameters(), strict=True):
        if isinstance(want.get_submodule(name.rpartition(".")[0]), NF4Linear):
            assert one.requires_grad == other.requires_grad, name
    ours, theirs = found.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert_same_bits(value, theirs[key])


MADE: dict[str, Callable[[], Any]] = {
    "llama": llama, "tied": lambda: llama(tie=True), "biased": lambda: llama(bias=True), "gpt2": gpt2, "t5": t5,
    "falcon": lambda: tiny("falcon"),
}  # fmt: skip
HOW: dict[str, dict[str, Any]] = {
    "usual": {}, "fp4": {"quant_type": "fp4", "blocksize": 128}, "flat": {"double_quant": False},
    "all": {"skip": []}, "some": {"skip": ["layers.0.mlp", "q_proj", "lm_head"]},
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


SHORT = [("llama", "usual", torch.bfloat16), ("tied", "all", torch.float32), ("biased", "flat", torch.bfloat16),
         ("gpt2", "fp4", torch.float32), ("t5", "usual", torch.bfloat16), ("falcon", "all", torch.float32),
         ("llama", "some", torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "dtype"), matrix(itertools.product(MADE, HOW, DTYPES), SHORT))
def test_it_is_what_quantize_model_makes(tmp_path: Path, name: str, how: str, dtype: torch.dtype) -> None:
    dense = MADE[name]()
    dense.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=SHARD)
    cls = type(dense)
    want = quantize_model(cls.from_pretrained(tmp_path, dtype=dtype), **HOW[how])
    found = cls.from_pretrained(tmp_path, dtype=dtype, quantization_config=nf4_config(**HOW[how], strict=True))
    same(found, want)
    assert found.config.quantization_config.to_dict() == want.config.quantization_config.to_dict()
    device_map = {"": "cpu"}
    mapped = cls.from_pretrained(tmp_path, dtype=dtype, quantization_config=nf4_config(**HOW[how]),
                                 device_map=device_map)  # fmt: skip
    same(mapped, want)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("experts", [True, False])
def test_experts(tmp_path: Path, name: str, experts: bool) -> None:
    dense = tiny(name)
    dense.save_pretrained(tmp_path)
    want = quantize_model(type(dense).from_pretrained(tmp_path), experts=experts)
    config = nf4_config(experts=experts, strict=True)
    same(type(dense).from_pretrained(tmp_path, quantization_config=config), want)


def test_a_new_head_is_quantised_too(tmp_path: Path) -> None:
    """A layer of no file is made by transformers and quantised afterwards, as before; `strict` refuses it."""
    llama().save_pretrained(tmp_path)
    auto: Any = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path, quantization_config=nf4_config())
    assert isinstance(model.score, NF4Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    with pytest.raises(AdapterFileError, match=r"its files lack score\.weight"):
        auto.from_pretrained(tmp_path, quantization_config=nf4_config(strict=True))


def test_refusals(tmp_path: Path) -> None:
    cls = type(llama())
    llama().save_pretrained(tmp_path)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp", "lm_head"]
    for arguments, message in (
        ({"quant_type": "nf5"}, "nf5"), ({"blocksize": 65}, "65"), ({"skip": names}, "no linear layer"),
        ({"experts": True}, "no dense experts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(tmp_path, quantization_config=nf4_config(**arguments))
    with pytest.raises(ValueError, match="on disk"):
        cls.from_pretrained(tmp_path, quantization_config=nf4_config(), device_map={"": "disk"})


# --- broken files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path, max_shard_size=SHARD)
    return tmp_path


KEY, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def shard_of(folder: Path, key: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][key]


def rewritten(key: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], Path]:
    def broken(folder: Path) -> Path:
        shard = shard_of(folder, key)
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
        return shard

    return broken


def truncated(folder: Path) -> Path:
    shard = shard_of(folder, KEY)
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard


def no_header(folder: Path) -> Path:
    shard = shard_of(folder, KEY)
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    return shard


def twice(folder: Path) -> Path:
    one, other = shard_of(folder, KEY), shard_of(folder, "model.layers.0.mlp.up_proj.weight")
    save_file(load_file(other) | {KEY: load_file(one)[KEY]}, other, metadata={"format": "pt"})
    return max(one, other)


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (truncated, "truncated"),
    "no_header": (no_header, "no safetensors file"),
    "twice": (twice, "is in .* too"),
    "lacks": (rewritten(KEY, lambda t: t.pop(KEY)), f"lacks {KEY}"),
    "lacks_norm": (rewritten(NORM, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "shape": (rewritten(KEY, lambda t: t.update({KEY: torch.zeros(64, 96)})), f"size mismatch for {KEY}"),
    "norm": (rewritten(NORM, lambda t: t.update({NORM: torch.ones(63)})), f"size mismatch for {NORM}"),
    "nan": (rewritten(KEY, lambda t: t[KEY].view(-1)[5].fill_(torch.nan)), f"NaN.* in {KEY}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(folder: Path, name: str) -> None:
    change, message = BROKEN[name]
    shard = change(folder)
    with pytest.raises(AdapterFileError, match=message) as raised:
        type(llama()).from_pretrained(folder, quantization_config=nf4_config(strict=True))
    assert shard.name in str(raised.value)
    source = models.Source(str(folder), "folder x")
    with pytest.raises(UserError, match=message) as told:
        models.load_base(source, torch.float32, torch.device("cpu"), "nf4", {})
    assert shard.name in told.value.problem


def test_a_file_that_changes_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, put = shard_of(folder, KEY), Streaming._put

    def touched(self: Streaming, name: str, value: torch.Tensor) -> None:
        put(self, name, value)
        with shard.open("ab") as file:
            file.write(b"x")

    monkeypatch.setattr(Streaming, "_put", touched)
    with pytest.raises(AdapterFileError, match=f"{shard.name}: changed while it was read"):
        type(llama()).from_pretrained(folder, quantization_config=nf4_config())


# --- the programs ---------------------------------------------------------------------------------------------------


def test_bases_of_the_programs(folder: Path, tmp_path: Path) -> None:
    source, cpu = models.Source(str(folder), "folder x"), torch.device("cpu")
    how = {"quantize_skip": ["lm_head", "v_proj"], "double_quant": False}
    found = models.load_base(source, torch.bfloat16, cpu, "nf4", how)
    dense = type(found).from_pretrained(folder, dtype=torch.bfloat16)
    same(found, quantize_model(dense, double_quant=False, skip=["lm_head", "v_proj"]))
    assert not any(p.requires_grad for p in found.parameters())
    for wrong in ({"quantize_experts": True}, {"quantize_skip": ["layers", "lm_head"]}):
        with pytest.raises(UserError) as told:
            models.load_base(source, torch.float32, cpu, "nf4", wrong)
        assert told.value.fix == "change quantize, quantize_skip or quantize_experts"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_folders_are_taken_as_they_are(folder: Path, kind: str, monkeypatch: Any) -> None:
    quantised = folder.parent / f"{folder.name}-bnb"
    want = quantize_model(type(llama()).from_pretrained(folder), kind)
    want.save_pretrained(quantised, max_shard_size=SHARD)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it would raise
    source, cpu = models.Source(str(quantised), "folder x"), torch.device("cpu")
    same(models.load_base(source, torch.float32, cpu, kind, {}), want)
    other = {"nf4": "fp4", "fp4": "nf4"}[kind]
    with pytest.raises(UserError, match=f"holds {kind} weights"):
        models.load_base(source, torch.float32, cpu, other, {})
    shutil.rmtree(quantised)


# --- files that are mapped, and memory -------------------------------------------------------------------------------


def test_files_that_are_written_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8), "half": torch.randn(3, 5).half(), "none": torch.empty(0, 4),
        "one": torch.tensor(3.0), "whole": torch.randn(16, 16), "turned": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False]), "brain": torch.randn(32, 2, dtype=torch.bfloat16),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors)
    header = read_header(tmp_path / "x.safetensors")
    assert all(begin % tensors[name].dtype.itemsize == 0 for name, begin in header.begins.items())
    assert header.begins["whole"] % 64 == header.begins["brain"] % 64 == 0
    for found in (load_file(tmp_path / "x.safetensors"), map_tensors(header)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert_same_bits(found[name], tensor)
    mapped = map_tensors(header)
    mapped["whole"].zero_()  # stays in this process
    assert_same_bits(load_file(tmp_path / "x.safetensors")["whole"], tensors["whole"])
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(AdapterFileError, match="changed while it was read"):
        map_tensors(header)


def test_only_later_mappings_are_given_back(tmp_path: Path) -> None:
    """An earlier one may be of a model in use, which was written into."""
    save_file({"w": torch.ones(1 << 16)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    earlier = map_tensors(header)["w"]
    earlier.fill_(2)
    files = MappedFiles([header.path])
    later = map_tensors(header)["w"]
    later.fill_(3)
    files.release()
    assert_same_bits(earlier, torch.full((1 << 16,), 2.0))
    if sys.platform.startswith("linux"):
        assert_same_bits(later[-1024:-512], torch.ones(512))


def test_dense_weights_are_let_go_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    alive: list[int] = []
    put = Streaming._put

    def noted(self: Streaming, name: str, value: torch.Tensor) -> None:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(value))
        put(self, name, value)

    monkeypatch.setattr(Streaming, "_put", noted)
    type(llama()).from_pretrained(folder, dtype=torch.bfloat16, quantization_config=nf4_config())
    assert alive == [0] * 14


@pytest.mark.full_form
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_loading(tmp_path: Path) -> None:
    """At most the finished model, the largest tensor twice, the process after its imports and 0.1 GB; what is kept is
    opened without memory of its own, also by a step."""
    model = llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
                  num_key_value_heads=4, vocab_size=4096)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    dense = sum(p.nbytes for p in model.parameters())
    del model
    found, _ = measured(tmp_path / "dense", tmp_path / "kept")
    allowed = found["model"] + 2 * found["largest"] + found["imports"]["peak"] + 10**8
    assert found["loaded"]["peak"] <= allowed < found["imports"]["peak"] + dense
    again, said = measured(tmp_path / "dense", tmp_path / "kept")
    assert "opened the quantised model" in said
    assert again["model"] == found["model"]
    grown = {stage: again[stage]["RssAnon"] - again["imports"]["RssAnon"] for stage in ("loaded", "step")}
    assert grown["loaded"] < again["model"] / 8
    assert again["step"]["RssFile"] - again["imports"]["RssFile"] > again["model"] / 2
