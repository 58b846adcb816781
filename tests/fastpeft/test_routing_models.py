"""Mixed batches of whole models: forward and generate, encoder-decoder models too, PEFT's errors, training."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import IA3Config, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
llama, config, pair, add_both, assert_same_outputs, X = (
    tools[name] for name in ("llama", "config", "pair", "add_both", "assert_same_outputs", "X")
)
TARGETS = ["q_proj", "v_proj", "down_proj"]
# A kind each; LoRA three times, so that several rows share a call of the kernel.
CONFIGS = {
    "default": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "wide": LoraConfig(r=8, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "bias": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=TARGETS, use_dora=True, init_lora_weights=False),
    "ia3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "oft": OFTConfig(target_modules=TARGETS, oft_block_size=4, init_weights=False),
    "vera": VeraConfig(r=8, target_modules=TARGETS, init_weights=False),
}
ROWS = ["default", "dora", "__base__", "ia3", "wide", "default", "oft", "vera", "bias", "wide", "dora"]


def mixed_model(**options: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(llama(**options), CONFIGS["default"])
    for name, other in CONFIGS.items():
        if name != "default":
            model.add_adapter(name, other)
    with torch.no_grad():  # so that every kind does something
        for name, p in model.named_parameters():
            if any(part in name for part in ("oft_", "ia3_", "vera_lambda", "lora_B")):
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def ids(rows: int, length: int = 6) -> Tensor:
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(4))


def alone(model: Any, name: str, run: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return run(model)
    model.set_adapter(name)
    return run(model)


def test_every_row_of_several_kinds_is_what_it_is_alone() -> None:
    model, x = mixed_model(), ids(len(ROWS))
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        mixed = model(x, adapter_names=ROWS).logits
        rows = [
            torch.cat([alone(m, n, lambda m, i=i: m(x[i : i + 1]).logits) for i, n in enumerate(ROWS)])  # type: ignore[misc]
            for m in (model, wide)
        ]
        assert_no_worse(mixed, *rows, 8 * (rows[1].abs() + rows[1].abs().mean()))
    base = llama().double()
    with torch.no_grad():
        for i, name in enumerate(ROWS):
            assert torch.equal(rows[1][i], base(x[i : i + 1]).logits[0]) == (name == "__base__")


def test_layers_that_come_later_are_told_of_their_rows() -> None:
    """A model's layers are known between forwards, as long as they hang where they did; a copy has its own."""
    model, x, names = get_peft_model(llama(), CONFIGS["default"]), ids(4), ["default", "wide", "__base__", "wide"]
    model.eval().add_adapter("wide", CONFIGS["wide"])

    def logits(m: Any) -> Tensor:
        with torch.no_grad():
            return m(x, adapter_names=names).logits

    assert_same_bits(logits(model), logits(copy.deepcopy(model)))
    attention = model.base_model.model.model.layers[0].self_attn
    before, layer = logits(model), copy.deepcopy(attention.q_proj)
    torch.nn.init.normal_(layer.lora_B["wide"].weight)
    attention.q_proj = torch.nn.Sequential(layer)
    after = logits(model)
    assert not torch.equal(after[1], before[1])
    attention.q_proj = layer
    assert_same_bits(after, logits(model))
    assert_same_bits(after, logits(copy.deepcopy(model)))


class Break(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("whole", [True, False])
def test_graphs_give_rows_their_adapters(whole: bool) -> None:
    parts = [torch.nn.Linear(8, 8)] if whole else [Break(), torch.nn.Linear(8, 8), Break()]
    model = get_peft_model(torch.nn.Sequential(*parts), LoraConfig(r=2, target_modules=["0" if whole else "1"]))
    target = [*model.targeted_module_names]
    model.eval().add_adapter("b", LoraConfig(r=3, target_modules=target, init_lora_weights=False))
    x, rows = torch.randn(3, 8), [["b", "default", "__base__"], ["b", "b", "default"]]
    with torch.no_grad():
        run = torch.compile(model, backend="eager", fullgraph=whole)
        for names in (*rows, *rows):
            assert_same_bits(run(x, adapter_names=names), model(x, adapter_names=names))


@pytest.mark.parametrize(
    "how", ["plain", "without-a-cache", "beams", "beams-of-a-config", "beams-of-the-model", "beams-left-to-the-model"]
)
def test_generation_gives_every_row_its_own_text(how: str) -> None:
    model, x = mixed_model(), ids(len(ROWS))
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if how == "beams":
        options["num_beams"] = 3
    if how == "beams-of-a-config":
        options = {"generation_config": GenerationConfig(num_beams=3, **options)}
    if how in ("beams-of-the-model", "beams-left-to-the-model"):
        model.get_base_model().generation_config.num_beams = 3
    if how == "beams-left-to-the-model":
        options = {"generation_config": GenerationConfig(**options)}
    if how == "without-a-cache":
        options["use_cache"] = False
    together = model.generate(x, adapter_names=ROWS, **options)
    one_by_one = [
        alone(model, n, lambda m, i=i: m.generate(x[i : i + 1], **options))[0]  # type: ignore[misc]
        for i, n in enumerate(ROWS)
    ]
    assert together.tolist() == [row.tolist() for row in one_by_one]


def t5_pair(targets: list[str]) -> tuple[Any, Any]:
    models = []
    for package in (fastpeft, peft):
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
        options = {"target_modules": targets, "init_lora_weights": False, "task_type": "SEQ_2_SEQ_LM"}
        model = package.get_peft_model(base, package.LoraConfig(r=4, **options))
        model.add_adapter("other", package.LoraConfig(r=2, **options))
        models.append(model.eval())
    models[0].load_state_dict(models[1].state_dict())
    return models[0], models[1]


@pytest.mark.parametrize("targets", [["q", "v", "wo"], ["q", "shared", "lm_head"]])
def test_an_encoder_sees_each_row_once_and_beams_repeat_the_decoders(targets: list[str]) -> None:
    ours, theirs = t5_pair(targets)
    x, labels, names = ids(3), ids(3, 4), ["other", "__base__", "default"]
    with torch.no_grad():
        a, b = (m(input_ids=x, labels=labels, adapter_names=names).logits for m in (ours, theirs))
        exact = copy.deepcopy(theirs).double()(input_ids=x, labels=labels, adapter_names=names).logits
        assert_no_worse(a, b, exact, 8 * (exact.abs() + exact.abs().mean()))
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        a, b = (m.generate(input_ids=x, adapter_names=names, max_new_tokens=5, **options) for m in (ours, theirs))
        assert torch.equal(a, b)
    dora = LoraConfig(r=2, target_modules=["v"], use_dora=True, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    ours.add_adapter("dora", dora)  # which PEFT refuses in a mixed batch
    together = ours.generate(input_ids=x, adapter_names=["dora", "other", "dora"], max_new_tokens=5, num_beams=2)
    ours.set_adapter("dora")
    one = ours.generate(input_ids=x[2:], max_new_tokens=5, num_beams=2)[0].tolist()
    longest = max(len(one), together.shape[1])
    assert one + [0] * (longest - len(one)) == together[2].tolist() + [0] * (longest - together.shape[1])


def test_errors_are_pefts() -> None:
    ours, theirs = pair()
    add_both(ours, theirs, "other", r=2)
    names = ["other", "__base__", "default"]

    def both(call: Any, error: type[Exception]) -> None:
        said = []
        for model in (ours, theirs):
            with pytest.raises(error) as caught:
                call(model)
            said.append(str(caught.value))
        assert said[0] == said[1]

    both(lambda m: m(X, adapter_names=["typo", "other", "more"]), ValueError)
    both(lambda m: m(X, adapter_names=["other"]), ValueError)
    both(lambda m: m(X, adapter_names=[*names, "other"]), ValueError)
    both(lambda m: m.generate(X, adapter_names=["other"], max_new_tokens=2, pad_token_id=0), ValueError)
    both(lambda m: m.generate(X, adapter_names="abc", num_beams=2, max_new_tokens=2, pad_token_id=0), Exception)
    both(lambda m: m.train()(X, adapter_names=names), ValueError)
    both(lambda m: (m.eval().merge_adapter(), m(X, adapter_names=names)), ValueError)
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert_same_outputs(ours, theirs, adapter_names=names)  # nothing of the failures is left


def grads(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_adapters_train_in_one_batch(checkpointing: bool) -> None:
    """Each has the gradient that its rows give it alone, with gradient checkpointing too."""
    names = ["default", "ia3", "wide", "default", "dora", "wide", "__base__"]
    x = ids(len(names))
    found = []
    for dtype in (torch.float32, torch.float64):
        model = mixed_model().to(dtype).train()
        model.set_requires_grad([*CONFIGS])
        for name in dict.fromkeys(names[:-1]):
            rows = [i for i, row in enumerate(names) if row == name]
            model.set_adapter(name)
            model(x[rows]).logits.square().sum().backward()
        separate = grads(model)
        model.set_adapter("vera")
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.set_requires_grad([*CONFIGS])
        with model.base_model.rows_assigned(names):
            loss = model(x).logits.square().sum()
        loss.backward()
        found.append((separate, grads(model)))
        assert checkpointing == model.get_base_model().is_gradient_checkpointing
    (eager, mine), (exact, _) = found
    assert set(mine) == set(exact)
    assert any("ia3" in name for name in mine)
    for name, value in exact.items():
        assert_no_worse(mine[name], eager[name], value, 16 * value.abs().max().expand_as(value))
    # An ordinary step after a mixed one is an ordinary step, when layers run again in the backward pass, too.
    model.set_adapter("default")
    model(x).logits.square().sum().backward()
    after = grads(model)
    assert {n.split(".")[-2] for n in after} == {"default"}
