"""Methods that act on whole modules: Llama-Adapter beside PEFT's, and what all such methods have in common."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from torch import Tensor

from peft_kernels.testing import assert_same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
tools = runpy.run_path(str(Path(__file__).with_name("whole_tools.py")))
IDS = tools["IDS"]
PROMPT = tools["PROMPT"]
SHADOW = tools["SHADOW"]
CAUSAL = tools["CAUSAL"]
base = tools["base"]
put = tools["put"]
scattered = tools["scattered"]
close = tools["close"]
beside = tools["beside"]
both_ways = tools["both_ways"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adaption_prompts_are_pefts(kind: str, tmp_path: Path) -> None:
    ours, theirs = beside("AdaptionPromptConfig", {**PROMPT, **CAUSAL}, kind)
    both_ways(ours, theirs, tmp_path, kind)
    assert ours.active_peft_config.target_modules == theirs.active_peft_config.target_modules
    content = fastpeft.PeftConfig.from_json_file(tmp_path / "fastpeft-peft" / "adapter_config.json")
    assert content.keys() == theirs.active_peft_config.to_dict().keys()


def plain_prompt(model: Any, states: Tensor, angles: Any, layer: int) -> Tensor:
    """The share of a prompt, head by head."""
    attention = model.model.layers[layer].self_attn
    module, d = attention.base_layer, attention.base_layer.head_dim
    prompt, gate = attention.adaption_prompt["default"][0], attention.adaption_gate["default"]
    q = module.q_proj(states).unflatten(-1, (-1, d))
    k, v = (part(prompt).unflatten(-1, (-1, d)) for part in (module.k_proj, module.v_proj))
    cos, sin = (angle[:, :, None] for angle in angles)
    q = q * cos + torch.cat((-q[..., d // 2 :], q[..., : d // 2]), -1) * sin
    heads = [
        torch.softmax(q[:, :, h] @ k[:, h // (q.shape[2] // k.shape[1])].t() / d**0.5, -1)
        @ v[:, h // (q.shape[2] // v.shape[1])]
        for h in range(q.shape[2])
    ]
    return module.o_proj(gate * torch.cat(heads, -1))


def test_prompts_go_to_the_heads_that_read_them() -> None:
    """Also where heads times their size are not the width, for which PEFT makes shapes that do not fit."""
    model = scattered(put(fastpeft, "AdaptionPromptConfig", PROMPT, "mistral"), fastpeft)
    got, attention = {}, model.get_base_model().model.layers[2].self_attn
    attention.register_forward_hook(lambda m, a, k, out: got.update(k, whole=out[0]), with_kwargs=True)
    attention.base_layer.register_forward_hook(lambda m, a, k, out: got.update(inner=out[0]), with_kwargs=True)
    model(IDS)
    added = plain_prompt(model.get_base_model(), got["hidden_states"], got["position_embeddings"], 2)
    close(got["whole"], got["inner"] + added)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        put(peft, "AdaptionPromptConfig", PROMPT, "mistral")(IDS)


def test_rows_have_prompts_of_their_own() -> None:
    model = scattered(put(fastpeft, "AdaptionPromptConfig", PROMPT), fastpeft)
    model.add_adapter("other", fastpeft.AdaptionPromptConfig(adapter_len=2, adapter_layers=3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other" in name:
                p.normal_(std=0.5)
    model.eval()
    assert {layer.active_adapters[0] for layer in model.get_layer_status()} == {"default"}
    rows = ["other", "default", "__base__", "other"]
    ids = IDS[[0, 1, 0, 1]]
    mixed = model(ids, adapter_names=rows).logits
    for i, name in enumerate(rows):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            close(mixed[i : i + 1], model(ids[i : i + 1]).logits)
    assert not torch.equal(mixed[0], mixed[2])
    lora = {"r": 2, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}
    model.add_adapter("lora", fastpeft.LoraConfig(**lora))
    model.eval()
    for rows in (["lora", "default", "other", "lora"], ["other"] * 4):  # on an attention and on layers in it
        mixed = model(ids, adapter_names=rows).logits
        for i, name in enumerate(rows):
            model.set_adapter(name)
            close(mixed[i : i + 1], model(ids[i : i + 1]).logits)
    model.base_model.set_adapter(["default", "other"])  # both act, one after the other
    assert not torch.equal(model(IDS).logits, mixed[:2])


@pytest.mark.parametrize("name", ["AdaptionPromptConfig", "ShadowConfig"])
def test_other_methods_have_a_place_in_the_same_model(name: str, tmp_path: Path) -> None:
    """A LoRA in the module, put in before and after; its file is that of a model without the other adapter."""
    options = PROMPT if name == "AdaptionPromptConfig" else {**SHADOW, "shadow_model": "mirror"}
    lora = {"r": 2, "target_modules": r"model\.layers\.\d\.self_attn\.(q|o)_proj", "init_lora_weights": False}
    torch.manual_seed(5)
    alone = fastpeft.get_peft_model(base(), fastpeft.LoraConfig(**lora))
    alone.save_pretrained(tmp_path / "lora")
    outer = scattered(put(fastpeft, name, options), fastpeft).eval()
    expected = outer(IDS).logits
    outer.save_pretrained(tmp_path / "outer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastpeft.PeftWarning)
        first, second = fastpeft.PeftModel.from_pretrained(base(), tmp_path / "lora", "plain"), outer
        first.load_adapter(tmp_path / "outer", "outer")
        second.load_adapter(tmp_path / "lora", "plain")
    seen = []
    for model, outer_name in ((first, "outer"), (second, "default")):
        model.eval().base_model.set_adapter([outer_name, "plain"])
        seen.append(model(IDS).logits)
        model.save_pretrained(tmp_path / "again", selected_adapters=["plain"])
        assert_same_state(tmp_path / "again" / "plain", tmp_path / "lora")
        model.set_adapter(outer_name)
        close(model(IDS).logits, expected)
        model.set_adapter("plain")
        close(model(IDS).logits, alone(IDS).logits)
    close(*seen)
    assert not torch.equal(seen[0], expected)
    second.base_model.merge_adapter(adapter_names=["plain"])
    close(second(IDS).logits, alone(IDS).logits)
    second.base_model.unmerge_adapter()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        second.base_model.merge_adapter(adapter_names=["default"])
    assert_same_bits(second.unload()(IDS).logits, base()(IDS).logits)
    assert second.get_base_model().state_dict().keys() == base().state_dict().keys()


def assert_same_state(a: Path, b: Path) -> None:
    one, other = (fastpeft.load_peft_weights(folder, device="cpu") for folder in (a, b))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert_same_bits(value, other[key])


def test_quicker_layers_do_not_go_around_a_prompt() -> None:
    model = scattered(put(fastpeft, "AdaptionPromptConfig", PROMPT), fastpeft)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    report = fastpeft.accelerate(model, huge_pages=False)
    assert report.modules
    assert str(report)
    got = model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    close(got.logits, expected.logits)


def test_an_attention_to_an_encoder_has_no_prompt() -> None:
    """In PEFT it fails at its first forward."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, add_cross_attention=True))
    config = fastpeft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, target_modules="crossattention")
    with pytest.raises(ValueError, match=r"h\.0\.crossattention: .* attends to an encoder's"):
        fastpeft.get_peft_model(model, config)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("options", "which", "told"), [
    ({"adapter_len": 3, "adapter_layers": 4}, "llama", "more adapter layers '4' than the model has '3'"),
    ({"adapter_len": 3}, "llama", "`adapter_layers` should be a positive integer"),
    ({"adapter_layers": 1, "adapter_len": 0}, "llama", "`adapter_len` should be a positive integer"),
    (PROMPT, "opt", "Unsupported model type for adaption prompt: 'opt'"),
    ({**PROMPT, "target_modules": "mlp"}, "llama", "needs an attention, LlamaMLP has no q_proj"),
    ({**PROMPT, "target_modules": ["self_attn"]}, "llama", "the name of the attentions"),
])  # fmt: skip
def test_prompts_that_fit_nowhere_are_refused(options: dict[str, Any], which: str, told: str) -> None:
    model = base(which)
    before = str(model)
    with pytest.raises(ValueError, match=told):
        fastpeft.get_peft_model(model, fastpeft.AdaptionPromptConfig(**options))
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())
