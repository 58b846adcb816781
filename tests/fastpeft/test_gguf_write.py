"""GGUF files that programs describe and write: reports, adapters for llama.cpp, merged models."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import (
    LoraConfig,
    PeftModel,
    VeraConfig,
    WriteError,
    adapter_modules,
    export_gguf_lora,
    get_peft_model,
    load_gguf_model,
    save_merged_gguf,
)  # fmt: skip
from fastpeft.apps.cli.app import app
from fastpeft.files.gguf_file import read_gguf
from fastpeft.weights.gguf_names import GGUFNames
from typer.testing import CliRunner

from peft_kernels import dequantize_4bit, use_backend
from peft_kernels.testing import assert_no_worse, assert_same_bits

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from gguf_tools import tiny_gguf  # noqa: E402  # imports gguf


def run(*words: object, code: int = 0) -> str:
    """A command's output: on stdout, or where it fails its line on stderr."""
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return str(done.stderr if code else done.stdout)


def result_of(*words: object) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run(*words, "--json"))
    return parsed


def test_inspect(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    found = result_of("inspect", path)
    assert (found["type"], found["architecture"], found["name"]) == ("model", "llama", "tiny")
    assert found["adapter"] is None
    # seven of each of two layers; a layer's two norms and the last
    assert {name: one["tensors"] for name, one in found["types"].items()} == {"Q8_0": 1, "Q4_1": 14, "F32": 5}
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert found["types"]["Q4_1"] == {"tensors": 14, "elements": 2 * layer, "bytes": 2 * layer // 32 * 20}
    assert found["tensors"]["blk.1.ffn_up.weight"] == {"shape": [64, 32], "type": "Q4_1"}
    assert found["file_bytes"] == path.stat().st_size > found["bytes"]
    shown = run("inspect", path, "--keys")
    assert "blk.1.ffn_up.weight" in shown
    assert "64x32" in shown
    path.write_bytes(path.read_bytes()[:300])
    assert "x.gguf: truncated" in run("inspect", path, code=1)


# --- adapters for llama.cpp -----------------------------------------------------------------------------------------


def decoded(path: Path) -> Any:
    """The file's model as transformers decodes it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip


def adapted(base: Path, out: Path, dense: bool = False, **options: Any) -> Any:
    """A random LoRA on a GGUF file's layers, saved to `out`. dense: on transformers' own."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    config = LoraConfig(base_model_name_or_path=str(base), task_type="CAUSAL_LM", **{**settings, **options})
    model = get_peft_model(decoded(base) if dense else load_gguf_model(base), config)
    model.save_pretrained(out)
    return model


def as_read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    return values, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def transformers_rows(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in transformers' order, of those in llama.cpp's."""
    return w.reshape(heads, len(w) // heads // 2, 2, -1).transpose(1, 2).reshape(w.shape)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "zero": {"lora_alpha": 0},  # for which llama.cpp would scale by 1
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_lora_for_llama_cpp(tmp_path: Path, name: str) -> None:
    """Read back: names of the base's file, and what every layer adds, x A^T B^T times alpha / r."""
    base, out = tiny_gguf(tmp_path / "x.gguf"), tmp_path / "lora.gguf"
    model = adapted(base, tmp_path / "adapter", **OPTIONS[name])
    said = result_of("export", "--gguf-lora", tmp_path / "adapter", out)
    values, tensors = as_read(out)
    assert (values["general.architecture"], values["general.type"], values["adapter.type"]) == (
        "llama", "adapter", "lora",
    )  # fmt: skip
    assert said["tensors"] == list(tensors)
    own = {n for n, t in read_gguf(base).tensors.items() if len(t.shape) == 2 and n != "token_embd.weight"}
    assert {n.removesuffix(".lora_a").removesuffix(".lora_b") for n in tensors} == own
    layers = dict(adapter_modules(model))
    assert len(layers) == 14
    paths = GGUFNames.of(base)
    for path, layer in layers.items():
        key = paths.name(path.removeprefix("base_model.model."))
        assert key is not None
        a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
        if key.endswith(("attn_q.weight", "attn_k.weight")):
            b = transformers_rows(b, 4 if "attn_q" in key else 2)
        own_a, own_b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        x = torch.randn(3, a.shape[1])
        scale = values["adapter.lora.alpha"] / len(a)
        if name == "plain":
            assert_same_bits(x @ a.T @ b.T * scale, x @ own_a.T @ own_b.T * layer.scaling["default"])
        else:
            exact = x.double() @ own_a.double().T @ own_b.double().T * layer.scaling["default"]
            size = x.abs().double() @ own_a.abs().double().T @ own_b.abs().double().T * layer.scaling["default"]
            eager = x @ own_a.T @ own_b.T * layer.scaling["default"]
            assert_no_worse(x @ a.T @ b.T * scale, eager, exact, size)
    found = result_of("inspect", out)
    assert found["adapter"]["alpha"] == values["adapter.lora.alpha"] == said["alpha"]
    assert found["adapter"]["ranks"] == {"4": 14}
    assert found["adapter"]["targets"]["attn_q"] == 2
    assert "attn_q (2 modules)" in run("inspect", out)
    assert "exists" in run("export", "--gguf-lora", tmp_path / "adapter", out, code=1)


def test_a_lora_of_a_folder(tmp_path: Path) -> None:
    """The same file by the base's folder as by its GGUF file; a family without such files is refused."""
    base = tiny_gguf(tmp_path / "x.gguf")
    adapted(base, tmp_path / "adapter")
    transformers.AutoConfig.from_pretrained(str(tmp_path), gguf_file="x.gguf").save_pretrained(tmp_path / "folder")
    for model, out in ((base, "a.gguf"), (tmp_path / "folder", "b.gguf")):
        export_gguf_lora(str(tmp_path / "adapter"), model, tmp_path / out)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    transformers.OPTConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="family 'opt' is not known as a GGUF file; those that are: llama, mistral"):
        export_gguf_lora(str(tmp_path / "adapter"), tmp_path / "other", tmp_path / "c.gguf")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA is refused"),
    "head": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embedding": ({"dense": True, "target_modules": ["embed_tokens"]}, "tensors other than lora_A and lora_B"),
    "tied": ({"target_modules": ["lm_head"]}, "no tensor of its own for lm_head"),
}


@pytest.mark.filterwarnings("ignore")  # of PEFT's, about tied layers
@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_has_no_lora_for(tmp_path: Path, name: str) -> None:
    base = tiny_gguf(tmp_path / "x.gguf")
    options, message = REFUSED[name]
    adapted(base, tmp_path / "adapter", **options)
    words = ("export", "--gguf-lora", tmp_path / "adapter", tmp_path / "lora.gguf", "--model", base)
    assert message in run(*words, code=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "x.gguf"]


def test_another_method_and_another_base(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path / "x.gguf")
    model = get_peft_model(load_gguf_model(base), VeraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the method is VERA"):
        export_gguf_lora(model, base, tmp_path / "lora.gguf")
    other = tmp_path / "other"
    transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=64).save_pretrained(other)  # fmt: skip
    model = adapted(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"down_proj: the adapter is for a layer of \(32, 64\), \(out, in\)"):
        export_gguf_lora(model, other, tmp_path / "lora.gguf")
    assert "use --gguf-lora" in run("export", tmp_path / "adapter", tmp_path / "lora.gguf", code=1)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half-written, and the file of before as it was."""
    base, out = tiny_gguf(tmp_path / "x.gguf"), tmp_path / "lora.gguf"
    model = adapted(base, tmp_path / "adapter")
    out.write_bytes(b"before")
    padding, calls = gguf.GGUFWriter.write_padding, []

    def full(self: Any, *args: Any) -> None:
        padding(self, *args)
        calls.append(args)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(gguf.GGUFWriter, "write_padding", full)
        with pytest.raises(WriteError, match="the disk is full"):
            export_gguf_lora(model, base, out)
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "lora.gguf", "x.gguf"]
    export_gguf_lora(model, base, out)
    assert result_of("inspect", out)["type"] == "adapter"


# --- merged models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "F16"])
def test_a_merged_model_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str) -> None:
    """Changed matrices are the merged ones, rounded once; keys, tokenizer and all else are the base's bytes."""
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "cache"))
    base, out = tiny_gguf(tmp_path / "x.gguf"), tmp_path / "merged.gguf"
    adapted(base, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "up_proj"])
    said = result_of("merge", tmp_path / "adapter", out, "--gguf", quant)
    assert (said["changed"], said["tensors"]) == (6, 20)
    assert not (tmp_path / "cache").exists()  # nothing was converted
    before, after = as_read(base), as_read(out)
    numbers = ("general.file_type", "GGUF.kv_count")
    assert {k: v for k, v in after[0].items() if k not in numbers} == {
        k: v for k, v in before[0].items() if k not in numbers
    }
    assert list(after[1]) == list(before[1])
    changed = ("attn_q.weight", "attn_k.weight", "ffn_up.weight")
    for name, one in before[1].items():
        if not name.endswith(changed):
            assert_same_bits(after[1][name], one)
    dense = PeftModel.from_pretrained(decoded(base), str(tmp_path / "adapter")).merge_and_unload()
    kind = gguf.GGMLQuantizationType[quant]
    model = load_gguf_model(out)
    for path, layer in model.named_modules():
        if not path.endswith(("q_proj", "k_proj", "up_proj")):
            continue
        merged = dense.get_submodule(path).weight.detach().numpy()
        want = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(merged, kind), kind))
        if quant == "F16":
            found = layer.weight.detach()
        else:
            with use_backend("reference"):
                found = dequantize_4bit(layer.quant_weight(), torch.float32)
        assert_same_bits(found, want)
    assert "exists" in run("merge", tmp_path / "adapter", out, "--gguf", quant, code=1)
    words = ("merge", tmp_path / "adapter", tmp_path / "o.gguf", "--gguf")
    assert "convert_hf_to_gguf.py" in run(*words, quant, "--model", tmp_path, code=1)
    words = ("merge", tmp_path / "no-adapter-yet", *words[2:])  # refused before anything is looked at
    assert "expected one of F16, Q4_0, Q8_0" in run(*words, "Q3", code=1)
    assert not (tmp_path / "o.gguf").exists()


def test_what_needs_a_dense_base_is_merged_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that are trained in full; a line says so."""
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "cache"))
    base, out = tiny_gguf(tmp_path / "x.gguf", tie=False), tmp_path / "merged.gguf"
    model = adapted(base, tmp_path / "adapter", dense=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head is trained in full: merge on a dense base"):
        save_merged_gguf(model, base, out, "Q8_0")
    words = ["merge", tmp_path / "adapter", out, "--gguf", "Q8_0", "--model", base]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert "lm_head is trained in full: the base is converted to float32" in done.stderr
    assert read_gguf(out).tensors["blk.0.attn_q.weight"].quant == "Q8_0"
    assert list((tmp_path / "cache").iterdir())
