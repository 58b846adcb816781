"""4-bit transformers models: ours load there with bitsandbytes, theirs load here without it; Trainer accepts them."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.files.checks import AdapterFileError
from fastpeft.weights.load_nf4 import load_nf4_model
from fastpeft.weights.nf4_linear import NF4Linear
from fastpeft.weights.quantize import dequantize_model, nf4_config, quantize_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kernels.testing import assert_no_worse, assert_same_bits

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).reshape(2, 12)


def llama(tie: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie, attention_bias=bias,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {"llama": llama, "tied": lambda: llama(tie=True), "biased": lambda: llama(bias=True), "gpt2": gpt2}


def exact_logits(model: nn.Module) -> torch.Tensor:
    """float64 logits of the same quantised weights."""
    exact = dequantize_model(pickle.loads(pickle.dumps(model)), torch.float32).double()
    return exact(IDS).logits


def close(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """The law for a deep model: each logit is held to their largest error, not to their luck at that logit."""
    worst = (theirs.double() - exact).abs().max()
    assert_no_worse(ours, (exact + worst).to(theirs.dtype), exact, exact.abs().max().expand(exact.shape))


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


def bnb_config(kind: str = "nf4", nested: bool = True) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_transformers_with_bitsandbytes_loads_what_is_saved_here(bnb, tmp_path, name):
    model = quantize_model(MODELS[name]())
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["load_in_4bit"]) == ("bitsandbytes", True)
    assert settings["llm_int8_skip_modules"] == ["lm_head"]
    theirs = type(model).from_pretrained(tmp_path).train()  # train: its eval path rounds scales to bfloat16
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in theirs.modules())
    close(model(IDS).logits, theirs(IDS).logits.detach(), exact_logits(model))
    state = model.state_dict()
    for key, value in theirs.state_dict().items():
        assert_same_bits(state[key], value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_what_transformers_with_bitsandbytes_saved_loads_here(bnb, tmp_path, name, kind, nested, monkeypatch):
    dense = MODELS[name]()
    dense.save_pretrained(tmp_path / "dense")
    theirs = type(dense).from_pretrained(tmp_path / "dense", quantization_config=bnb_config(kind, nested))
    theirs.save_pretrained(tmp_path / "bnb")
    expected = theirs.train()(IDS).logits.detach()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it would now raise
    ours = load_nf4_model(tmp_path / "bnb")
    assert sum(isinstance(m, NF4Linear) for m in ours.modules()) == (8 if name == "gpt2" else 14)
    assert not ours.training
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == dense.config.tie_word_embeddings
    close(ours(IDS).logits, expected, exact_logits(ours))
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for key, value in ours.state_dict().items():
        assert_same_bits(value, state[key])
    # quantising here the same dense weights gives the same bytes
    again = quantize_model(dense, kind, double_quant=nested).state_dict()
    for key, value in state.items():
        assert_same_bits(again[key], value)


def test_round_trip_with_our_own_loader(tmp_path):
    model = quantize_model(llama(tie=True), blocksize=128)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_nf4_model(tmp_path)
    assert_same_bits(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.quantization_config.load_in_4bit
    loaded.save_pretrained(tmp_path / "again")
    assert_same_bits(load_nf4_model(tmp_path / "again")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tmp_path, dtype):
    model = quantize_model(llama(dtype=dtype))
    model.save_pretrained(tmp_path)
    loaded = load_nf4_model(tmp_path)
    assert loaded.dtype == dtype
    assert loaded.model.layers[0].mlp.up_proj.absmax.dtype == torch.uint8
    assert loaded.model.layers[0].mlp.up_proj.nested_absmax.dtype == torch.float32
    assert_same_bits(loaded(IDS).logits, model(IDS).logits)
    wide = load_nf4_model(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert wide(IDS).logits.dtype == torch.float32


def test_from_pretrained_quantises_with_our_config(tmp_path):
    dense = llama()
    dense.save_pretrained(tmp_path)
    config = nf4_config(quant_type="fp4", skip=["lm_head", "q_proj"])
    model = type(dense).from_pretrained(tmp_path, quantization_config=config)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.model.layers[0].self_attn.k_proj.quant_type == "fp4"
    expected = quantize_model(dense, "fp4", skip=["lm_head", "q_proj"])
    assert_same_bits(model(IDS).logits, expected(IDS).logits)


def test_a_quantised_model_is_marked_and_unmarked():
    model = quantize_model(llama())
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    assert model.num_parameters() > 0
    logits = model(IDS).logits
    again = pickle.loads(pickle.dumps(model))
    assert_same_bits(again(IDS).logits, logits)
    assert again.hf_quantizer.is_trainable
    model.to(torch.bfloat16)  # allowed: our layers keep their scales
    model.to(torch.float32)
    dense = model.dequantize()
    assert not any(isinstance(m, NF4Linear) for m in dense.modules())
    assert not getattr(dense, "is_quantized", False)
    assert getattr(dense.config, "quantization_config", None) is None
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear


def test_other_models_are_left_unmarked():
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert not hasattr(model, "is_quantized")


def test_training_an_adapter_leaves_the_base_alone():
    model = fastpeft.prepare_model_for_kbit_training(quantize_model(llama()))
    assert model.is_gradient_checkpointing
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert_same_bits(after[key], value)


# --- folders that must be refused -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    quantize_model(llama()).save_pretrained(tmp_path)
    return tmp_path


KEY = "model.layers.0.mlp.up_proj.weight"
STATE = KEY + ".quant_state.bitsandbytes__nf4"


def text(**facts: object) -> torch.Tensor:
    known = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [88, 64]}
    return torch.tensor(list(json.dumps({**known, **facts}).encode()), dtype=torch.uint8)


BAD = {
    "missing": (lambda t: t.pop("model.norm.weight"), "missing model.norm.weight"),
    "unexpected": (lambda t: t.update({"model.evil.weight": torch.zeros(3)}), "unexpected model.evil.weight"),
    "size": (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "size mismatch for model.norm.weight"),
    "bytes": (lambda t: t.update({KEY: torch.zeros(10, 1, dtype=torch.uint8)}), "size mismatch"),
    "shape": (lambda t: t.update({STATE: text(shape=[64, 88])}), "size mismatch"),
    "no_absmax": (lambda t: t.pop(KEY + ".absmax"), "missing"),
    "absmax": (lambda t: t.update({KEY + ".absmax": torch.zeros(4, dtype=torch.uint8)}), "absmax"),
    "huge": (lambda t: t.update({STATE: text(shape=[1 << 40, 1 << 40])}), "bytes"),
    "no_such_layer": (lambda t: t.update({"x.y.weight.quant_state.bitsandbytes__nf4": text()}), "does not have"),
    "not_linear": (lambda t: t.update({"model.norm.weight.quant_state.bitsandbytes__nf4": text()}), "LlamaRMSNorm"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(folder, name):
    change, message = BAD[name]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((AdapterFileError, RuntimeError), match=message):
        load_nf4_model(folder)


def test_dense_folders_are_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="load_in_4bit"):
        load_nf4_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterFileError, match="no 4-bit weights"):
        load_nf4_model(tmp_path)


def test_shards_stay_inside_the_folder(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {KEY: "../../x.safetensors"}}))
    with pytest.raises(AdapterFileError, match="leaves its folder"):
        load_nf4_model(folder)


def test_code_in_a_folder_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert type(load_nf4_model(folder)).__name__ == "LlamaForCausalLM"
    settings["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        load_nf4_model(folder)
