"""aLoRA and AdaLoRA: beside PEFT where PEFT is right, and right where it is not."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import AdaLoraConfig, LoraConfig
from fastpeft.methods.lora.variants.alora import offsets
from fastpeft.methods.registry import get_method
from fastpeft.testing import SAMPLE_BASES, add_adapter, assert_law, make_layer
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn

LORA = get_method("LORA")
tools = runpy.run_path(str(Path(__file__).with_name("variants_tools.py")))
IDS, Net = tools["IDS"], tools["Net"]
assert_as_peft, close, pair, run, scatter = (tools[n] for n in ("assert_as_peft", "close", "pair", "run", "scatter"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::fastpeft.config.types.PeftWarning")


# --- aLoRA ------------------------------------------------------------------------------------------------------------

ALORA = {"r": 3, "target_modules": ["up", "gpt"], "task_type": "CAUSAL_LM"}


def test_alora_s_offsets_are_those_of_peft() -> None:
    ids = torch.randint(0, 3, (40, 9), generator=torch.Generator().manual_seed(0))
    for tokens in ([1], [1, 2], [0, 0, 1], [2] * 9, [1] * 12):
        config = {"a": peft.LoraConfig(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")}
        assert offsets(ids, tokens) == calculate_alora_offsets(config, "a", ids)


def _alora(tokens: list[int]) -> Callable[[Any], dict[str, Any]]:
    return lambda package: {**ALORA, "alora_invocation_tokens": tokens}


def test_alora_computes_and_trains_as_pefts_does() -> None:
    tokens = IDS[1, 2:4].tolist()
    ours, theirs = pair(_alora(tokens))
    for kwargs in ({}, {"alora_offsets": [None, 2, 100]}):
        for train in (False, True):
            a, b = run_ids(ours, train, **kwargs), run_ids(theirs, train, **kwargs)
            assert a.keys() == b.keys()
            for name, value in a.items():
                close(value, b[name], times=8)
    base = Net()(IDS)
    y = ours.eval()(input_ids=IDS)
    close(y[0], base[0])  # no invocation in this row
    close(y[1, :1], base[1, :1])  # the convolution looks one token ahead
    assert not torch.equal(y[1, 2:], base[1, 2:])
    with pytest.raises(ValueError, match="cannot be merged"):
        ours.merge_adapter()


def run_ids(model: nn.Module, train: bool, **kwargs: Any) -> dict[str, Tensor]:
    model.train(train)
    model.zero_grad()
    y = model(input_ids=IDS, **kwargs)
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    return {"output": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_alora_in_a_mixed_batch() -> None:
    tokens = IDS[1, 2:4].tolist()
    model = fastpeft.get_peft_model(Net(), LoraConfig(**ALORA, alora_invocation_tokens=tokens), "a")
    model.add_adapter("other", LoraConfig(**ALORA, alora_invocation_tokens=IDS[2, :1].tolist()))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["up"], task_type="CAUSAL_LM"))
    alone = {}
    for name in ("a", "other", "lora"):
        model.set_adapter(name)
        scatter(model)
        alone[name] = model.eval()(IDS)
    mixed = model(IDS, adapter_names=["lora", "a", "other"])
    for i, name in enumerate(["lora", "a", "other"]):
        close(mixed[i], alone[name][i])
    model.set_adapter("lora")  # an aLoRA that is not active but in the batch
    close(model(IDS, adapter_names=["a"] * 3), alone["a"])
    with pytest.raises(ValueError, match="got 3 and 1 respectively"):
        model(IDS, adapter_names=["lora", "a", "other"], alora_offsets=[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.set_adapter("a")
        with pytest.raises(TypeError):
            model(inputs_embeds=torch.zeros(1))
    assert any("base model answers" in str(w.message) for w in caught)


def test_alora_generates_what_peft_does_with_and_without_a_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=31, num_key_value_heads=1)).eval()

    texts = []
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False,
               "task_type": "CAUSAL_LM", "alora_invocation_tokens": [7, 3]}  # fmt: skip
    ids = torch.tensor([[4, 7, 3, 9, 2], [1, 2, 5, 7, 3], [1, 2, 3, 4, 5]])
    for package in (fastpeft, peft):
        model = package.get_peft_model(llama(), package.LoraConfig(**options))
        scatter(model, 0.5)
        model.eval()
        texts.append(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
        if package is fastpeft:
            # PEFT moves the start along with the end, so that without a cache the invocation falls out again.
            without = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
            named = model.generate(inputs=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            beams = model.generate(input_ids=ids, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
            several = model.generate(input_ids=ids, max_new_tokens=2, num_return_sequences=2, do_sample=True)
            with model.disable_adapter():
                plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(*texts)
    assert torch.equal(texts[0], without)
    assert torch.equal(texts[0], named)
    assert beams.shape == (3, 9)
    assert several.shape == (6, 7)
    assert torch.equal(texts[0][2], plain[2])
    assert not torch.equal(texts[0], plain)


def test_alora_under_checkpointing_finds_each_batch_again() -> None:
    class Checkpointed(Net):
        def forward(self, input_ids: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(super().forward, input_ids, use_reentrant=False)

    found = []
    for base in (Net, Checkpointed):
        tokens = IDS[1, 2:4].tolist()
        model = fastpeft.get_peft_model(base(), LoraConfig(**ALORA, alora_invocation_tokens=tokens)).train()
        scatter(model)
        loss = model(IDS.roll(1, 0)).square().sum() + model(IDS).sum()  # two batches, one backward pass
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        close(a, b)


# --- AdaLoRA ----------------------------------------------------------------------------------------------------------

ADALORA = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12, "lora_alpha": 7,
           "target_modules": ["up", "gpt", "head"], "orth_reg_weight": 0.3}  # fmt: skip


def _train(model: Any, steps: range) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in steps:
        loss = model(IDS, labels=IDS.flip(1)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adalora_trains_allocates_and_saves_as_pefts_does(tmp_path: Any) -> None:
    # Without a task PEFT's model leaves the regularisation out of its loss.
    ours, theirs = pair(lambda package: {**copy.deepcopy(ADALORA), "task_type": "CAUSAL_LM"}, "AdaLoraConfig")
    assert_as_peft(ours, theirs, train=False)
    for step in range(1, 15):
        a, b = (_train(m.train(), range(step, step + 1))[0] for m in (ours, theirs))
        assert abs(a - b) < 1e-4 * abs(b), step
        patterns = [m.peft_config["default"].rank_pattern for m in (ours, theirs)]
        kept = {k.replace(".default", ""): v for k, v in (patterns[1] or {}).items()}
        assert (patterns[0] or {}) == kept, step
    assert sum(map(sum, kept.values())) == 2 * 3
    assert any(len(v) != sum(v) for v in kept.values())

    y = ours.eval()(IDS)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [fastpeft.saving.folder.load_adapter_file(tmp_path / n) for n in ("ours", "theirs")]
    assert files[0][0]["rank_pattern"] == files[1][0]["rank_pattern"] == kept
    shapes = [{k: v.shape for k, v in f[1].items()} for f in files]
    assert shapes[0] == shapes[1]
    for folder in ("ours", "theirs"):
        for package in (fastpeft, peft):
            again = package.PeftModel.from_pretrained(Net(), tmp_path / folder).eval()
            close(again(IDS), y, times=64)
    assert again.base_model.model.up.lora_A["default"].shape[0] == sum(kept["up.lora_E"])
    # Into the adapter that is there, as Trainer does with the best checkpoint.
    scatter(ours, 0.1)
    ours.load_adapter(tmp_path / "ours", "default")
    assert ours.base_model.model.up.lora_A["default"].shape[0] == sum(kept["up.lora_E"])
    close(ours.eval()(IDS), y)


def test_adalora_gives_the_whole_budget_where_target_and_start_agree() -> None:
    model = fastpeft.get_peft_model(Net(), AdaLoraConfig(init_r=3, target_r=3, total_step=6, target_modules=["up"]))
    scatter(model)
    _train(model, range(1, 7))  # PEFT asks for the 0th smallest here, and fails
    assert model.peft_config["default"].rank_pattern == {"up.lora_E": [True] * 3}


def test_adalora_in_a_model_with_other_adapters() -> None:
    model = fastpeft.get_peft_model(Net(), LoraConfig(r=2, target_modules=["up"]), "lora")
    model.add_adapter("ada", AdaLoraConfig(**ADALORA))
    model.set_adapter(["lora", "ada"])
    scatter(model)
    plain = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flip(1).flatten())
    a = [p for n, p in model.named_parameters() if "ada" in n and "lora_A" in n]
    b = [p.t() for n, p in model.named_parameters() if "ada" in n and "lora_B" in n]
    orthogonal = sum((m @ m.t() - torch.eye(5)).norm() for m in a + b) / len(a + b)
    close(model(IDS, labels=IDS.flip(1)).loss, plain + 0.3 * orthogonal)
    _train(model, range(1, 13))
    assert model.peft_config["ada"].rank_pattern.keys() == {"up.lora_E", "gpt.lora_E", "head.lora_E"}
    model.set_adapter("lora")
    close(model(IDS, labels=IDS.flip(1)).loss,
          nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flip(1).flatten()))  # fmt: skip


def test_two_adaloras_train_at_once() -> None:
    """PEFT refuses a second one that trains. Each gives its budget out; together they are their sum."""
    both = fastpeft.get_peft_model(Net(), AdaLoraConfig(**ADALORA), "one")
    both.add_adapter("two", AdaLoraConfig(**{**ADALORA, "target_modules": ["up"]}))
    both.base_model.set_adapter(["one", "two"])
    scatter(both)
    _train(both, range(1, 13))
    assert both.peft_config["one"].rank_pattern.keys() == {"up.lora_E", "gpt.lora_E", "head.lora_E"}
    assert both.peft_config["two"].rank_pattern.keys() == {"up.lora_E"}
    layer = both.base_model.model.up
    x = torch.randn(3, layer.in_features)
    updates = [layer.get_delta_weight(name) for name in ("one", "two")]
    close(layer(x), nn.functional.linear(x, layer.base_layer.weight + sum(updates), layer.base_layer.bias))


class Inside(nn.Module):
    """A model in a `model`, as heads of transformers hold theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()
        self.config = self.model.config

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return self.model(input_ids, **others)


def test_adalora_names_its_layers_as_peft_does_where_the_base_holds_a_model(tmp_path: Any) -> None:
    model = fastpeft.get_peft_model(Inside(), AdaLoraConfig(**ADALORA))
    scatter(model)
    _train(model, range(1, 13))
    kept = model.peft_config["default"].rank_pattern
    assert kept.keys() == {f"model.{name}.lora_E" for name in ("up", "gpt", "head")}
    model.save_pretrained(tmp_path)
    for package in (fastpeft, peft):
        again = package.PeftModel.from_pretrained(Inside(), tmp_path).eval()
        assert len(again.base_model.model.model.up.lora_E["default"]) == sum(kept["model.up.lora_E"]) < 5
        close(again(IDS), model.eval()(IDS), times=64)


def test_adalora_on_convolutions_is_its_merged_weight() -> None:
    for base in ("conv1d", "conv2d", "conv2d-circular", "conv2d-groups", "conv3d"):
        layer = make_layer(base)
        add_adapter(layer, "a", get_method("ADALORA"), AdaLoraConfig(init_r=4, total_step=9))
        assert_law(layer, ["a"], SAMPLE_BASES[base].input())


def test_adalora_refuses_what_has_no_meaning() -> None:
    for options, match in (
        ({"total_step": None}, "total_step"), ({"tinit": 9}, "budgeting phase"),
        ({"orth_reg_weight": -1}, "or equal to 0"),
        ({"use_dora": True}, "no meaning"), ({"use_rslora": True}, "no meaning"), ({"init_r": 0}, "init_r"),
        ({"init_lora_weights": "pissa"}, "a bool"), ({"beta1": 1.0}, "beta1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            fastpeft.get_peft_model(Net(), AdaLoraConfig(**{**ADALORA, **options}))
    with pytest.raises(ValueError, match="cannot adapt 'emb'"):
        fastpeft.get_peft_model(Net(), AdaLoraConfig(**{**ADALORA, "target_modules": ["emb"]}))
