"""Models of GGUF files as they lie: equal to what transformers decodes of them, over the file's own bytes, trained,
served by the programs, and errors that name a broken file."""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastpeft import LoraConfig, accelerate, get_peft_model, load_gguf_model
from fastpeft.apps.training import models
from fastpeft.apps.training.config import TrainConfig, from_dict
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.inference import Answerer
from fastpeft.files import gguf_file
from fastpeft.files.checks import AdapterFileError
from fastpeft.files.gguf_file import GGUFFile, GGUFPackageError, read_gguf
from fastpeft.model.status import count_parameters
from fastpeft.pool.prompts import token_bytes
from fastpeft.weights.nf4_linear import NF4Linear
from fastpeft.weights.quant_embedding import QuantEmbedding
from forms import by_form, matrix

from peft_kernels import dequantize_4bit, use_backend
from peft_kernels.testing import assert_no_worse, assert_same_bits

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from gguf_tools import tiny_gguf  # noqa: E402  # imports gguf

IDS = torch.arange(24).reshape(2, 12)


def decoded(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The file's model as transformers decodes it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()  # fmt: skip


QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize(("quant", "tie"), matrix(
    [(quant, tie) for quant in (*QUANTISED, "F16", "BF16") for tie in (True, False)],
    short=[("Q4_1", True), ("Q8_0", False), ("F16", True)],
))  # fmt: skip
def test_it_is_what_transformers_decodes(tmp_path: Path, quant: str, tie: bool) -> None:
    floats = quant not in QUANTISED
    path = tiny_gguf(tmp_path / "x.gguf", types=quant, tie=tie, embedding="F32" if floats else "Q8_0")
    model, dense = load_gguf_model(path), decoded(path)
    held = {name for name, m in model.named_modules() if isinstance(m, (NF4Linear, QuantEmbedding))}
    assert len(held) == (0 if floats else 16)  # seven of two layers, the embedding and the head
    weights = {name: p.detach() for name, p in dense.named_parameters(remove_duplicate=False)}
    for name, one in weights.items():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        found = module._parameters.get("weight")
        if name.rpartition(".")[0] in held:
            with use_backend("reference"):
                found = dequantize_4bit(module.quant_weight(), torch.float32)
        assert_same_bits(found.detach(), one)
    assert count_parameters(model)[1] == sum(p.numel() for p in dense.parameters())
    exact = decoded(path).double()
    with torch.no_grad():
        want, eager = exact(IDS).logits, dense(IDS).logits
        scale = want.abs().max().expand_as(want)
        assert_no_worse(model(IDS).logits, eager, want, scale)
        accelerate(model)
        assert_no_worse(model(IDS).logits, eager, want, scale)


def test_blocks_stay_where_the_file_has_them(tmp_path: Path) -> None:
    """All but the rows of q and k, which llama.cpp keeps in another order; a tied head shares its embedding's."""
    path = tiny_gguf(tmp_path / "x.gguf")
    model = load_gguf_model(path)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (NF4Linear, QuantEmbedding))}
    whole = {n: m.weight.untyped_storage().nbytes() for n, m in layers.items()}
    own = {n for n, size in whole.items() if size != path.stat().st_size}
    assert own == {n for n in layers if n.endswith(("q_proj", "k_proj"))}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    data = path.read_bytes()
    model.model.layers[0].mlp.up_proj.weight.zero_()  # stays in this process
    assert path.read_bytes() == data
    empty = load_gguf_model(path, device="meta")
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(t.is_meta for t in empty.state_dict().values())


def test_a_state_dict_goes_in_and_out(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    model, other = load_gguf_model(path), load_gguf_model(tiny_gguf(tmp_path / "y.gguf", seed=1))
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(IDS).logits, model(IDS).logits)
    state = model.state_dict()
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"][1:]
    with pytest.raises(RuntimeError, match="packed must be"):
        other.load_state_dict(state)


@pytest.mark.parametrize("quant", ["Q4_1", "Q8_0"])
def test_merging_requantises_and_unmerging_restores_the_bytes(tmp_path: Path, quant: str) -> None:
    base = load_gguf_model(tiny_gguf(tmp_path / "x.gguf", types=quant))
    before = {name: t.clone() for name, t in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert len(model.base_model.targeted_module_names) == 14
    model.merge_adapter()
    merged = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert merged.quant_type == quant.lower()
    assert not torch.equal(merged.weight, before["model.layers.0.mlp.up_proj.weight"])
    model.unmerge_adapter()
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, NF4Linear):
            assert_same_bits(module.weight, before[name.replace(".base_layer", "") + ".weight"])


def test_the_base_is_not_written_as_a_folder(tmp_path: Path) -> None:
    base = load_gguf_model(tiny_gguf(tmp_path / "x.gguf"))
    for model in (base, copy.deepcopy(base)):
        with pytest.raises(ValueError, match=r"x\.gguf is not written as a folder: .*gguf_file=name"):
            model.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "base").exists()


# --- the programs ---------------------------------------------------------------------------------------------------


def test_how_a_base_is_kept() -> None:
    def of(model: str, **settings: Any) -> str:
        return from_dict({"model": model, "data": "x.jsonl", **settings}).quantize

    assert (of("x.gguf"), of("smollm2"), of("folder")) == ("gguf", "gguf", "nf4")
    assert of("x.gguf", quantize="nf4") == "nf4"
    with pytest.raises(UserError, match="is no GGUF file"):
        of("folder", quantize="gguf")
    for setting in ("cache_quantized", "quantize_experts"):
        with pytest.raises(UserError, match=f"{setting}=true, and a GGUF file"):
            TrainConfig("x.gguf", "x.jsonl", **{setting: True})


def test_train_generate_and_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.apps.cli.app import app
    from fastpeft.apps.training.testing import write_jsonl
    from typer.testing import CliRunner

    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "cache"))
    path = tiny_gguf(tmp_path / "x.gguf")
    settings = [f"model={path}", f"data={write_jsonl(tmp_path / 'data.jsonl')}", f"output={tmp_path / 'run'}",
                "eval_fraction=0.2", "max_steps=3", "max_length=64", "dtype=float32", "learning_rate=0.01"]  # fmt: skip

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    plan = run("train", *settings, "--dry-run", "--json")
    assert '"quantize": "gguf"' in plan
    run("estimate", str(path), *settings[5:7], "--json")
    run("train", *settings, "--json")
    adapter = str(tmp_path / "run" / "adapter")
    assert "as it lies" in Answerer.load(None, adapter).note
    run("generate", "--adapter", adapter, "--max-new-tokens", "4", "colour 3?", "--json")
    run("inspect", adapter, "--json")
    assert not (tmp_path / "cache").exists()  # nothing was converted


def test_a_server_knows_the_size_of_a_token(tmp_path: Path) -> None:
    """Keys and values are of the activations' dtype, which a table in blocks has, too."""
    model = load_gguf_model(tiny_gguf(tmp_path / "x.gguf"), torch.bfloat16)
    config = model.config
    heads = config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    assert token_bytes(model) == 2 * config.num_hidden_layers * heads * 2


# --- broken files ---------------------------------------------------------------------------------------------------

UP = "blk.1.ffn_up.weight"


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: tiny_gguf(path, change=change)


def bytes_changed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(tiny_gguf(path).read_bytes()))


def other_type(data: bytes, number: int) -> bytes:
    """The same file, in which one tensor says to be of another type: after its name, the count of sizes, two sizes."""
    at = data.index(UP.encode()) + len(UP) + 4 + 16
    return data[:at] + number.to_bytes(4, "little") + data[at + 4 :]


def with_nan(data: bytes, name: str) -> bytes:
    """The same file, in which the first block of a tensor has NaN as its scale, a float16."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        begin = read_gguf(file.name).tensors[name].begin
    return data[:begin] + b"\x00\x7e" + data[begin + 2 :]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "no GGUF file"),
    "other": (bytes_changed(lambda data: b"GGML" + data[4:]), "no GGUF file"),
    "header": (bytes_changed(lambda data: data[:300]), "truncated"),
    "truncated": (bytes_changed(lambda data: data[:-200]), "truncated"),
    "version": (bytes_changed(lambda data: data[:4] + b"\x63\0\0\0" + data[8:]), "version"),
    "unknown_type": (bytes_changed(lambda data: other_type(data, 250)), "250"),
    "type_of_others": (rewritten(lambda t: t.update({UP: (np.zeros((64, 256), np.float32), "TQ1_0")})), "is in TQ1_0"),
    "shape": (rewritten(lambda t: t.update({UP: (np.zeros((32, 32), np.float32), "Q4_1")})), "size mismatch for"),
    "norm": (rewritten(lambda t: t.update({"output_norm.weight": (np.zeros(31, np.float32), "F32")})), "size mismatch"),
    "scale": (bytes_changed(lambda data: with_nan(data, UP)), "the scale at byte 0 of a block holds 1 values"),
    "scale_of_a_copy": (bytes_changed(lambda data: with_nan(data, "blk.0.attn_q.weight")), "attn_q.weight': the scale"),
    "scale_of_the_table": (bytes_changed(lambda data: with_nan(data, "token_embd.weight")), "token_embd"),
    "nan": (rewritten(lambda t: t["output_norm.weight"][0].fill(np.nan)), "'output_norm.weight' has NaN or infinite"),
    "lacks": (rewritten(lambda t: t.pop(UP)), r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"),
    "more": (rewritten(lambda t: t.update({"blk.7.x.weight": (np.zeros(32, np.float32), "F32")})), "no place for"),
    "experts": (
        rewritten(lambda t: t.update({"blk.0.ffn_up_exps.weight": (np.zeros((2, 64, 32), np.float32), "Q4_1")})),
        "no place for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    make, message = BROKEN[name]
    path = tmp_path / "x.gguf"
    make(path)
    with pytest.raises(AdapterFileError, match=message) as raised:
        load_gguf_model(path)
    assert str(path) in str(raised.value)
    source = models.resolve(str(path), "gguf")
    with pytest.raises(UserError, match=message) as told:
        models.load_base(source, torch.float32, torch.device("cpu"), "gguf", {})
    assert told.value.fix == "give a whole GGUF file of a causal language model"


def test_any_byte_of_a_header(tmp_path: Path) -> None:
    """Cut off anywhere, or with another byte anywhere: a header or an AdapterFileError that names the file."""
    path = tiny_gguf(tmp_path / "x.gguf")
    data = path.read_bytes()
    end = min(tensor.begin for tensor in read_gguf(path).tensors.values())
    draw = random.Random(0)
    step = by_form(short=29, full_form=5)
    for at in range(0, end, step):
        flipped = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        for changed in (data[:at], flipped):
            path.write_bytes(changed)
            said, found = "", None
            try:
                found = read_gguf(path)
            except AdapterFileError as error:
                said = str(error)
            assert (found is None and str(path) in said) or len(changed) == len(data)
            assert found is None or all(t.begin + t.nbytes <= len(data) for t in found.tensors.values())


def test_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    file = read_gguf(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(AdapterFileError, match=r"x\.gguf: changed while it was read"):
        file.mapped()
    bytes_of = GGUFFile.bytes_of

    def touched(self: GGUFFile, name: str) -> torch.Tensor:
        found = bytes_of(self, name)
        with path.open("ab") as stream:
            stream.write(b"x")
        return found

    monkeypatch.setattr(GGUFFile, "bytes_of", touched)
    with pytest.raises(AdapterFileError, match="changed while it was read"):
        load_gguf_model(path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GGUFPackageError, match="pip install gguf"):
        load_gguf_model(path)
    with pytest.raises(UserError, match="needs the package gguf"):
        models.resolve(str(path), "gguf")
