"""X-LoRA beside live PEFT: outputs, gradients, generation, files both ways, and what is refused."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.saving.folder import load_adapter_file
from torch import Tensor, nn

close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]
IDS = torch.arange(10).view(2, 5)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::fastpeft.config.types.PeftWarning")


def base() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=16)).eval()
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters of other ranks and targets."""
    folder, found = tmp_path_factory.mktemp("experts"), {}
    for i, targets in enumerate((["q_proj", "v_proj", "embed_tokens"], ["q_proj", "k_proj"], ["q_proj", "v_proj"])):
        model = base()
        torch.manual_seed(i + 1)
        config = fastpeft.LoraConfig(task_type="CAUSAL_LM", r=2 + i, target_modules=targets, init_lora_weights=False)
        fastpeft.get_peft_model(model, config).save_pretrained(folder / str(i), save_embedding_layers=False)
        found[str(i)] = str(folder / str(i))
    return found


def model_of(package: Any, experts: dict[str, str], **options: Any) -> Any:
    own = {"task_type": "CAUSAL_LM", "hidden_size": 16, "xlora_depth": 3, "xlora_size": 8, "adapters": experts}
    model = package.get_peft_model(base(), package.XLoraConfig(**{**own, **options}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def run(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(input_ids=IDS).logits
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    grads = {n.rpartition("classifier")[2].lstrip("s").replace(".default", "").replace("lora_model.", ""): p.grad
             for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip
    return {"y": y.detach(), **grads}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"layerwise_scalings": True, "xlora_depth": 1},
    {"top_k_lora": 2, "softmax_temperature": 0.5},
    {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    {"scaling_pass_value": 0.7, "global_scaling_weight": 1.5},
    {"use_trainable_adapters": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_xlora_computes_as_pefts_does(experts: dict[str, str], options: dict[str, Any]) -> None:
    ours, theirs = (model_of(package, experts, **options) for package in (fastpeft, peft))
    found, expected = run(ours), run(theirs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        close(value, expected[name], times=8)
    assert not torch.equal(found["y"], base()(IDS).logits)
    close(ours.get_latest_scalings(), theirs.get_latest_scalings())
    with torch.no_grad():
        close(ours(IDS).logits, expected["y"])  # adapters of one rank are kept together
        with ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, base()(IDS).logits)
    tokens = [model.generate(input_ids=IDS, max_new_tokens=4) for model in (ours, theirs)]
    assert torch.equal(*tokens)


def test_files_go_both_ways(experts: dict[str, str], tmp_path: Path) -> None:
    ours = model_of(fastpeft, experts, layerwise_scalings=True)
    expected = ours(IDS).logits.detach()
    ours.save_pretrained(tmp_path)
    for package in (fastpeft, peft):
        model = package.PeftModel.from_pretrained(base(), tmp_path).eval()
        close(model(IDS).logits, expected)
    again = base()
    for _ in range(2):  # the second time the model still has the adapters of the first
        close(fastpeft.PeftModel.from_pretrained(again, tmp_path)(IDS).logits, expected)
    config = fastpeft.PeftConfig.from_pretrained(tmp_path)
    theirs = model_of(peft, experts, layerwise_scalings=True)
    theirs.save_pretrained(tmp_path / "theirs")
    assert config == fastpeft.PeftConfig.from_pretrained(tmp_path / "theirs")
    # PEFT's file lacks what looks like an adapter's: the classifier's layer 0
    lacking = load_adapter_file(tmp_path)[1].keys() - load_adapter_file(tmp_path / "theirs")[1].keys()
    assert lacking == {f"base_model.internal_xlora_classifier.layers.0.{end}" for end in ("weight", "bias")}
    with pytest.warns(UserWarning, match=r"lacks .*layers\.0\.weight, .*layers\.0\.bias"):
        fastpeft.PeftModel.from_pretrained(base(), tmp_path / "theirs")


def test_trained_adapters_are_loaded_from_where_they_were_saved(experts: dict[str, str], tmp_path: Path) -> None:
    model = model_of(fastpeft, experts, use_trainable_adapters=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                assert parameter.requires_grad
                parameter.mul_(-2)
    expected = model(IDS).logits.detach()
    model.save_pretrained(tmp_path)
    close(fastpeft.PeftModel.from_pretrained(base(), tmp_path)(IDS).logits, expected)


def test_names_of_adapters_are_free(experts: dict[str, str]) -> None:
    """PEFT activates them by these names and loads them as 0, 1, ..."""
    named = {f"expert-{name}": path for name, path in experts.items()}
    close(model_of(fastpeft, named)(IDS).logits, model_of(fastpeft, experts)(IDS).logits)
    with pytest.raises(KeyError):
        model_of(peft, named)(IDS)


def test_rows_of_a_batch_with_other_adapters(experts: dict[str, str]) -> None:
    model = model_of(fastpeft, experts)
    mixed = model(IDS.repeat(2, 1), adapter_names=["default", "1", "__base__", "default"]).logits
    alone = model(IDS).logits
    close(mixed[0], alone[0])
    close(mixed[3], alone[1])
    close(mixed[2], base()(IDS).logits[0])
    model.set_adapter("1")  # a LoRA as any other
    close(mixed[1], model(IDS).logits[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpoints_and_dropout(experts: dict[str, str], reentrant: bool) -> None:
    """Reentrant ones go backward block by block, each through the classifier; PEFT's gradients are wrong then."""
    model = model_of(fastpeft, experts)
    expected = run(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.get_base_model().model.decoder.dropout = 0.0
    for layer in model.get_base_model().model.decoder.layers:
        layer.dropout = layer.self_attn.dropout = 0.0
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, value in run(model).items():
        close(value, expected[name], times=8)


def test_logs_and_settings(experts: dict[str, str]) -> None:
    model = model_of(fastpeft, experts)
    model.enable_scalings_logging()
    model.generate(input_ids=IDS, max_new_tokens=3)
    assert [len(places) for places, _ in model.get_bucketed_scalings_log().values()] == [1, 1, 1]
    assert [t.shape for t in model.get_scalings_log()] == [(2, n, 7, 3) for n in (5, 6, 7)]
    model.clear_scalings_log()
    model.disable_scalings_logging()
    model(IDS)
    assert model.get_scalings_log() == []
    model.set_scaling_pass_value(None)
    assert model.internal_xlora_classifier.config.scaling_pass_value == 1 / 3
    model.set_topk_lora(1)
    assert model.peft_config["default"].top_k_lora == 1
    with pytest.raises(ValueError, match="top_k_lora"):
        model.set_topk_lora(4)
    layer = model.base_model.model.model.decoder.layers[0].self_attn.q_proj
    assert not layer._forward_pre_hooks
    assert not model.get_base_model()._forward_pre_hooks


def test_xlora_refuses_what_makes_no_sense(experts: dict[str, str], tmp_path: Path) -> None:
    def bad(match: str, model: nn.Module | None = None, **options: Any) -> None:
        model = base() if model is None else model
        keys, trained = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
        own = {"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": experts}
        config = fastpeft.XLoraConfig(**{**own, **options})
        with pytest.raises(ValueError, match=match):
            fastpeft.get_peft_model(model, config)
        assert list(model.state_dict()) == keys
        assert [p.requires_grad for p in model.parameters()] == trained
        assert not getattr(model, "peft_config", None)

    cached = base()
    cached.config.use_cache = True
    bad("`use_cache` must be False", cached)
    bad("depth must be strictly positive", xlora_depth=0)
    bad("top_k_lora", top_k_lora=4)
    bad("adapters", adapters={})
    for name, more in (("dora", {"use_dora": True}), ("conv", {"target_modules": ["fc1"], "use_rslora": True})):
        config = fastpeft.LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **more})
        fastpeft.get_peft_model(base(), config).save_pretrained(tmp_path / name)
    bad("'3' is a Dora", adapters={**experts, "d": str(tmp_path / "dora")})
    with pytest.raises(FileNotFoundError):
        model_of(fastpeft, {**experts, "none": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match="expected hidden states"):
        model_of(fastpeft, experts, hidden_size=12)(IDS)
    model = model_of(fastpeft, experts)
    with pytest.raises(ValueError, match="has no merged form"):
        model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = fastpeft.get_peft_model(base(), fastpeft.LoraConfig(target_modules=["fc1"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="different peft types"):
        taken.add_adapter("x", fastpeft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=experts))
    assert [*taken.peft_config] == ["default"]
