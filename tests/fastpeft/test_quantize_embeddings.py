"""Embeddings and heads in 8 bits: what they compute, beside float64 of what their blocks stand for; settings."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fastpeft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    dequantize_model,
    get_peft_model,
    load_cached_model,
    nf4_config,
    quantize_embeddings,
    quantize_model,
)
from fastpeft.apps.cli.app import app
from fastpeft.apps.estimate import parts, shapes
from fastpeft.apps.serve import run as serving
from fastpeft.apps.training import models
from fastpeft.apps.training.config import load_config
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.testing import make_tiny_run
from fastpeft.weights import streaming
from fastpeft.weights.nf4_linear import NF4Linear
from fastpeft.weights.quant_embedding import QuantEmbedding
from torch import nn
from typer.testing import CliRunner

from peft_kernels.testing import assert_no_worse, assert_same_bits

IDS = torch.arange(24).reshape(2, 12)


def llama(tie: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "tie_word_embeddings": tie, **options,
    })  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_vectors_logits_and_gradients(tie: bool) -> None:
    model = llama(tie)
    dense = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    replaced = quantize_embeddings(model)
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (type(words), type(head)) == (QuantEmbedding, NF4Linear)
    assert (head.weight is words.weight) is tie
    assert replaced == sum(t.nbytes for t in {id(t): t for t in dense}.values())
    plain = dequantize_model(copy.deepcopy(model))
    assert type(plain.get_input_embeddings()) is nn.Embedding
    for found, was in zip((plain.get_input_embeddings(), plain.get_output_embeddings()), dense, strict=True):
        step = was.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 127  # half of it, and the scale's own rounding
        assert ((found.weight - was).unflatten(1, (-1, 32)).abs() <= step).all()
    assert_same_bits(words(IDS), plain.get_input_embeddings()(IDS))
    x = torch.randn(2, 12, 64)
    grads, outs = [], []
    for layer, dtype in ((head, torch.float32), (plain.get_output_embeddings(), torch.float32),
                         (copy.deepcopy(plain.get_output_embeddings()).double(), torch.float64)):  # fmt: skip
        given = x.to(dtype, copy=True).requires_grad_()
        out = layer(given)
        out.square().sum().backward()
        outs.append(out.detach())
        grads.append(given.grad)
    assert_no_worse(*outs)
    assert_no_worse(*grads)


def test_what_has_no_form_is_refused() -> None:
    narrow = llama(False, hidden_size=48)
    with pytest.raises(ValueError, match="rows of 48 elements"):
        quantize_embeddings(narrow)
    assert type(narrow.get_input_embeddings()) is nn.Embedding
    bad = llama(False)
    bad.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN, infinite"):
        quantize_embeddings(bad)
    model = llama(True)
    quantize_embeddings(model)
    with pytest.raises(ValueError, match="embeddings in 8 bits is not written"):
        model.save_pretrained("nowhere")
    for config in (
        LoraConfig(target_modules=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]),
    ):
        with pytest.raises((ValueError, TypeError), match="QuantEmbedding"):
            get_peft_model(model, config)
    for words, match in (
        ("quantize=none", "quantize=none"), ("model=x.gguf", "used as it lies"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            load_config(None, ["model=m", "data=d", "quantize_embeddings=true", words])


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_estimate_has_the_bytes_of_the_model(tie: bool) -> None:
    model = quantize_model(llama(tie))
    quantize_embeddings(model)
    config = load_config(None, ["model=-m-", "data=-d-", "max_length=16", "dtype=float32", "quantize_embeddings=true"])
    found = parts.estimate(config, llama(tie).config, torch.float32, 0, both=False)
    assert found["memory_bytes"]["base"] == shapes.bytes_of(model)
    less = parts.estimate(load_config(None, ["model=-m-", "data=-d-", "max_length=16"]), llama(tie).config,
                          torch.float32, 0, both=False)["memory_bytes"]["base"]  # fmt: skip
    assert less - found["memory_bytes"]["base"] == (1 if tie else 2) * 96 * 64 * (4 - 34 / 32)


def test_a_run_and_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, asked and merged on the base that training had."""
    make_tiny_run(tmp_path, 12)

    def result_of(*words: object) -> dict[str, Any]:
        done = CliRunner().invoke(app, [str(words[0]), "--json", *map(str, words[1:])])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    data = next(tmp_path.glob("*.jsonl"))
    found = result_of("train", f"model={tmp_path / 'model'}", f"data={data}", f"output={tmp_path / 'run'}",
                      "max_steps=2", "max_length=64", "dtype=float32", "quantize_embeddings=true")  # fmt: skip
    asked = ("--dtype", "float32", "--max-new-tokens", 8, "colour 3?")
    told = result_of("generate", "--adapter", found["adapter"], *asked)["answers"]
    result_of("merge", found["adapter"], tmp_path / "merged", "--dtype", "fp32", "--onto", "quantized")
    assert result_of("generate", "--model", tmp_path / "merged", *asked)["answers"] == told
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):  # kept, then opened
        assert result_of("generate", "--adapter", found["adapter"], "--cache-quantized", *asked)["answers"] == told


def test_a_head_beyond_the_scales_leaves_the_embedding_as_it_was() -> None:
    model = llama(tie=False)
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight[3, 3] = 1e30
    with pytest.raises(ValueError, match="values too large for q8_0"):
        quantize_embeddings(model)
    assert model.get_input_embeddings() is words
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_tables_are_quantised_while_they_are_read_and_kept(tie: bool, tmp_path: Path) -> None:
    """The bits, classes and keys of the model that was read first; never a dense table in memory of its own."""
    dense = llama(tie)
    dense.save_pretrained(tmp_path / "dense")
    want = quantize_model(copy.deepcopy(dense))
    quantize_embeddings(want)
    seen: list[str] = []
    put = streaming.put_table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "put_table", lambda *words: seen.extend(words[1]) or put(*words))
        found = type(dense).from_pretrained(
            tmp_path / "dense", dtype=torch.float32, quantization_config=nf4_config(embeddings=True, strict=True)
        )
    assert sorted(seen) == ["lm_head", "model.embed_tokens"]
    settings, lines = {"embeddings": True}, []
    kept = [load_cached_model(tmp_path / "dense", tmp_path / "kept", torch.float32, say=lines.append, settings=settings)
            for _ in range(2)]  # fmt: skip
    assert lines[-1].startswith("opened")
    for model in (found, *kept):
        words, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (type(words), type(head)) == (QuantEmbedding, NF4Linear)
        assert (head.weight is words.weight) is tie
        assert model.all_tied_weights_keys == want.all_tied_weights_keys
        state = model.state_dict()
        assert state.keys() == want.state_dict().keys()
        for key, value in want.state_dict().items():
            assert_same_bits(state[key], value)
        assert_same_bits(model(IDS).logits, want(IDS).logits)
        with pytest.raises(ValueError, match="embeddings in 8 bits is not written"):
            model.save_pretrained("nowhere")
    load_cached_model(tmp_path / "dense", tmp_path / "kept", torch.float32, say=lines.append)
    assert "settings changed" in "".join(lines)


def test_a_table_that_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    how = {"quantize_embeddings": True}
    source, cpu = models.Source(str(tmp_path / "nan"), "folder nan"), torch.device("cpu")
    bad = llama(False)
    bad.model.embed_tokens.weight[0, 0] = torch.nan
    bad.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"model.safetensors: NaN.* in model.embed_tokens.weight"):
        models.load_base(source, torch.float32, cpu, "nf4", how)
    bad.model.embed_tokens.weight[0, 0] = 1e30
    bad.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"model.safetensors: .*values too large for q8_0"):
        models.load_base(source, torch.float32, cpu, "nf4", how)
    llama(False, hidden_size=48).save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="rows of 48 elements"):
        models.load_base(source, torch.float32, cpu, "nf4", how)


def test_a_server_and_settings_that_fit(tmp_path: Path) -> None:
    make_tiny_run(tmp_path, 4)
    words = [str(tmp_path / "model"), "max_length=128", "batch_size=1", "gradient_checkpointing=true"]

    def run(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["estimate", *words, "--gpu", "24GB", *more, "--json"])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    whole = run()
    least = run("quantize_embeddings=true")["memory_bytes"]
    room = whole["peak_bytes"] - (whole["memory_bytes"]["base"] - least["base"]) // 2
    assert run("--fit", f"{room}B")["fit"]["settings"]["quantize_embeddings"] is True
    options = serving.Options(str(tmp_path / "model"), nf4=True, dtype="float32", quantize_embeddings=True)
    loaded = serving.load(options, lambda line: None)
    try:
        assert isinstance(loaded.service.engine.model.get_input_embeddings(), QuantEmbedding)
    finally:
        loaded.close()
    with pytest.raises(UserError, match="--quantize-embeddings, and the base is not quantised"):
        serving.load(replace(options, nf4=False), lambda line: None)


@pytest.mark.parametrize("config", [
    PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"),
    PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
], ids=["prefix", "random", "sample", "p_tuning"])  # fmt: skip
def test_a_prompt_before_a_quantised_table(config: Any) -> None:
    model = llama(True)
    quantize_embeddings(model)
    logits = []
    for base in (model, dequantize_model(copy.deepcopy(model))):
        torch.manual_seed(1)
        found = get_peft_model(base, copy.deepcopy(config)).eval()
        logits.append(found(input_ids=IDS).logits)
    exact = logits[1].double()
    assert_no_worse(*logits, exact, exact.abs().max().expand_as(exact))
