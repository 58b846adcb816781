"""Adapters as state dicts and files, and their export for servers."""

from __future__ import annotations

import json
import warnings

import fastpeft
import pytest
import torch
from fastpeft.files.checks import KeyMismatchError
from fastpeft.saving.export import export_for_serving, inspect_adapter
from fastpeft.saving.folder import SAFETENSORS_NAME, load_adapter_file, save_adapter
from fastpeft.saving.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from peft_kernels.testing import assert_no_worse, assert_same_bits


def model_with(value: float | None = None, **options: object) -> fastpeft.PeftModel:
    base = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    base.forward = lambda x: base["down"](torch.tanh(base["up"](x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fastpeft.get_peft_model(base, fastpeft.LoraConfig(target_modules=["up", "down"], r=2, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_() if value is None else parameter.fill_(value)
    return model.eval()


def test_save_takes_shared_and_strided_tensors(tmp_path):
    a = torch.randn(8, 2)
    save_adapter(tmp_path, {"a": a.t(), "b": a, "c": a[2:4], "d": a}, {"peft_type": "LORA"})
    found = load_file(tmp_path / SAFETENSORS_NAME)
    for key, value in {"a": a.t(), "b": a, "c": a[2:4], "d": a}.items():
        assert_same_bits(found[key], value.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back(tmp_path, dtype):
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.randn(()).to(dtype), "z": torch.empty(0, 4, dtype=dtype)}
    save_adapter(tmp_path, tensors, {"peft_type": "LORA"})
    _, state = load_adapter_file(tmp_path)
    for key, value in tensors.items():
        assert_same_bits(state[key], value)


def test_state_dict_argument_supplies_the_values():
    model = model_with()
    full = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=full)
    for key, value in get_peft_model_state_dict(model).items():
        assert_same_bits(state[key], value + 1)
    full.pop(next(key for key in full if "lora_A" in key))
    with pytest.raises(KeyMismatchError, match="lora_A"):
        get_peft_model_state_dict(model, state_dict=full)


def test_set_state_dict_reports_and_refuses():
    model = model_with()
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model_with()).items()}
    first = next(iter(state))
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    # one tensor of another size: nothing at all is changed
    with pytest.raises(RuntimeError, match="size mismatch for"):
        set_peft_model_state_dict(model, {**state, first: state[first][:1]})
    for key, value in get_peft_model_state_dict(model).items():
        assert_same_bits(value, before[key])
    with pytest.warns(UserWarning, match="another size"):
        result = set_peft_model_state_dict(model, {**state, first: state[first][:1]}, ignore_mismatched_sizes=True)
    assert len(result.missing_keys) == 1
    removed = state.pop(first)
    result = set_peft_model_state_dict(model, {**state, "base_model.model.up.lora_C.weight": removed})
    assert result.missing_keys == [first.replace(".weight", ".default.weight")]
    assert result.unexpected_keys == ["base_model.model.up.lora_C.weight"]
    # base weights in an adapter file are not let in
    result = set_peft_model_state_dict(model, {"base_model.model.up.base_layer.weight": torch.zeros(8, 8)})
    assert result.unexpected_keys == ["base_model.model.up.base_layer.weight"]


def test_low_cpu_mem_usage_fills_meta_adapters(tmp_path):
    model = model_with()
    model.save_pretrained(tmp_path)
    base = model_with().unload()
    loaded = fastpeft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    for key, value in get_peft_model_state_dict(loaded).items():
        assert_same_bits(value, get_peft_model_state_dict(model)[key])


def tiny_llama(vocab: int = 32, tie: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_embeddings_are_saved_when_the_vocabulary_grew(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = fastpeft.get_peft_model(base, fastpeft.LoraConfig(target_modules=["q_proj"], r=2))
    assert not any("embed" in key for key in get_peft_model_state_dict(model))
    assert any("embed" in key for key in get_peft_model_state_dict(model, save_embedding_layers=True))
    base.resize_token_embeddings(40)
    with pytest.warns(UserWarning, match="resized"):
        state = get_peft_model_state_dict(model)
    names = [key for key in state if "lora" not in key]
    assert names == ["base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "adapter")
    other = type(base).from_pretrained(tmp_path / "base")
    with pytest.raises(KeyMismatchError, match="embed_tokens"):
        fastpeft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    other.resize_token_embeddings(40)
    loaded = fastpeft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    ids = torch.arange(40)[None]
    assert_same_bits(loaded(ids).logits, model(ids).logits)


# --- serving ----------------------------------------------------------------------------------------------------------


def test_inspect(tmp_path):
    model_with(use_rslora=True, rank_pattern={"down": 4}, lora_dropout=0.1).save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert report.method == "LORA"
    assert report.ranks == {2: 1, 4: 1}
    assert report.scalings == {8 / 2**0.5: 1, 8 / 4**0.5: 1}
    assert report.parameters == 2 * 8 * 2 + 2 * 8 * 4
    assert report.bytes == 4 * report.parameters
    assert report.manifest == "intact"
    assert any("rank_pattern" in reason for reason in report.serving["vllm"])
    assert not any("rsLoRA" in reason for reason in report.serving["vllm"])
    assert any("rsLoRA" in reason for reason in report.serving["sglang"])
    assert json.loads(json.dumps(dict(report)))["path"] == str(tmp_path)


def test_plain_adapters_are_served_as_they_are(tmp_path):
    model_with().save_pretrained(tmp_path)
    assert inspect_adapter(tmp_path).serving == {"vllm": [], "sglang": []}


SERVED = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"down": 5}, "alpha_pattern": {"up": 3}},
    "all": {"use_rslora": True, "rank_pattern": {"down": 5}, "alpha_pattern": {"up": 3}},
}


@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize("name", SERVED)
def test_export_computes_the_same_with_plain_r_and_alpha(tmp_path, name, source):
    model = model_with(**SERVED[name])
    model.save_pretrained(tmp_path / "in")
    config = export_for_serving(model if source == "model" else tmp_path / "in", tmp_path / "out")
    report = inspect_adapter(tmp_path / "out")
    assert report.serving == {"vllm": [], "sglang": []}
    assert list(report.ranks) == [config["r"]]
    assert type(config["lora_alpha"]) is int
    assert report.scalings == {config["lora_alpha"] / config["r"]: 2}
    x = torch.randn(5, 8)
    exact = fastpeft.PeftModel.from_pretrained(model_base(model), tmp_path / "in").double()(x.double())
    served = fastpeft.PeftModel.from_pretrained(model_base(model), tmp_path / "out").eval()
    worst = (model(x).double() - exact).abs().max()  # each element is held to the largest error, not to its luck
    assert_no_worse(served(x), (exact + worst).float(), exact, exact.abs().max().expand(exact.shape))


def model_base(model: fastpeft.PeftModel) -> nn.Module:
    """The base model again, of the same weights, without the adapter."""
    up, down = nn.Linear(8, 8), nn.Linear(8, 8)
    for new, old in ((up, model.base_model.model["up"]), (down, model.base_model.model["down"])):
        new.load_state_dict(old.base_layer.state_dict())
    base = nn.ModuleDict({"up": up, "down": down})
    base.forward = lambda x: base["down"](torch.tanh(base["up"](x)))
    return base


def test_export_of_a_plain_adapter_keeps_its_bytes(tmp_path):
    model = model_with()
    export_for_serving(model, tmp_path)
    _, state = load_adapter_file(tmp_path)
    for key, value in get_peft_model_state_dict(model).items():
        assert_same_bits(state[key], value)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"lora_bias": True}, {"modules_to_save": ["down"]}])
def test_export_refuses_what_servers_cannot_hold(tmp_path, options):
    model = model_with(**options)
    with pytest.raises(ValueError, match="no serving-safe form"):
        export_for_serving(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "in")
    assert inspect_adapter(tmp_path / "in").serving["vllm"] != []
