"""Experts of mixtures by `accelerate`: one product for all of them, LoRA as factors, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import fastpeft
from fastpeft.families import experts
from fastpeft.layer.base import MergingLayer
from fastpeft.weights.read_by_module import EXPERT_FACTORS, ParameterWeight
from forms import matrix

from peft_kernels import grouped_linear
from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]
tiny, exactly, drawn = tools["tiny"], tools["exactly"], tools["drawn"]
F32, BF16 = torch.float32, torch.bfloat16
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
# Weights by rows; by columns, with biases and another gate.
TARGETS = {name: ["gate_up_proj", "down_proj"] for name in ("mixtral", "gpt_oss")}


def with_lora(name: str, dtype: torch.dtype = F32, targets: list[str] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    config = fastpeft.LoraConfig(r=3, target_modules=[], target_parameters=targets or TARGETS[name], **options)
    model = fastpeft.get_peft_model(tiny(name, dtype), config)
    return drawn(model)


def logits_and_gradients(model: Any, ids: Tensor = IDS) -> list[Tensor]:
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [logits.detach(), torch.cat(grads)] if grads else [logits.detach()]


def no_worse(fast: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs, right in zip(fast, plain, exact, strict=True):
        worst = [(t.double() - right).abs().max().reshape(1).to(dtype) for t in (ours, theirs)]
        assert_no_worse(*worst, torch.zeros(1, dtype=torch.float64), right.abs().max().reshape(1))


def experts_of(model: Any) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


def never(*_: Any) -> Any:
    raise AssertionError("merged weights of all experts were made")


@pytest.mark.parametrize(("name", "dtype"), matrix(
    [(name, dtype) for name in TARGETS for dtype in (F32, BF16)],
    short=[("mixtral", BF16), ("gpt_oss", F32)],
))  # fmt: skip
def test_lora_on_experts(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(name, dtype)
    plain = logits_and_gradients(model)
    with exactly(model) as exact_model:
        exact = logits_and_gradients(exact_model)
    report = fastpeft.accelerate(model)
    assert report.served[("experts", "grouped_linear (native)")] == len(experts_of(model))
    with monkeypatch.context() as patched:
        patched.setattr(MergingLayer, "stored_weight", never)
        fast = logits_and_gradients(model)
    no_worse(fast, plain, exact, dtype)
    assert not any(vars(m).get(EXPERT_FACTORS) for m in experts_of(model))
    report.remove()
    for one, other in zip(logits_and_gradients(model), plain, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("change", ["two", "merged", "disabled", "one parameter"])
def test_what_is_more_than_one_plain_adapter(change: str) -> None:
    targets = ["down_proj"] if change == "one parameter" else None
    model = with_lora("mixtral", targets=targets)
    if change == "two":
        model.add_adapter("other", fastpeft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS["mixtral"]))
        drawn(model)
        model.base_model.set_adapter(["default", "other"])
    elif change == "merged":
        model.merge_adapter()
    elif change == "disabled":
        model.base_model.disable_adapter_layers()
    plain = logits_and_gradients(model) if change not in ("merged", "disabled") else [model(IDS).logits.detach()]
    fastpeft.accelerate(model)
    fast = logits_and_gradients(model) if len(plain) == 2 else [model(IDS).logits.detach()]
    for ours, theirs in zip(fast, plain, strict=True):
        close(ours, theirs)


def test_forward_is_merged() -> None:
    model = with_lora("mixtral")
    fastpeft.accelerate(model)
    with torch.no_grad():
        beside = model(IDS).logits
        model.merge_adapter()
        close(model(IDS).logits, beside)


def test_copies_and_pickles_are_served_and_undone() -> None:
    model = tiny("mixtral")
    implementation = model.config._experts_implementation
    with torch.no_grad():
        plain = model(IDS).logits
        fastpeft.accelerate(model)
        fast = model(IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_bits(other(IDS).logits, fast)
            assert fastpeft.unaccelerate(other)
            assert_same_bits(other(IDS).logits, plain)
        assert_same_bits(model(IDS).logits, fast)
    assert model.config._experts_implementation == implementation


def test_experts_of_another_process_give_nothing() -> None:
    """Expert parallelism numbers them from `num_experts` on, with a weight of zero."""
    model = tiny("mixtral")
    experts: Any = experts_of(model)[0]
    x, weights = torch.randn(5, 64, requires_grad=True), torch.rand(5, 2)
    experts._is_expert_parallel = True
    index = torch.tensor([[0, 1], [4, 2], [3, 4], [4, 4], [1, 0]])
    weights[index == 4] = 0.0
    want = experts(x, index, weights)
    gradient = torch.autograd.grad(want.sum(), x)[0]
    fastpeft.accelerate(model)
    got = experts(x, index, weights)
    close(got, want)
    close(torch.autograd.grad(got.sum(), x)[0], gradient)
    assert not got[3].any()


def test_experts_without_a_gate() -> None:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = NemotronHConfig(hidden_size=32, n_routed_experts=4, moe_intermediate_size=24, moe_latent_size=None)
    config._experts_implementation = "eager"
    experts = NemotronHExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.2)
    x, index, weights = torch.randn(6, 32), torch.tensor([[0, 1, 3]] * 6), torch.rand(6, 3)
    want = experts(x, index, weights)
    fastpeft.accelerate(experts)
    got = experts(x, index, weights)
    assert got.grad_fn is not None
    close(got, want)


def test_a_trained_router_gets_its_gradient() -> None:
    model = tiny("mixtral").requires_grad_()
    plain = logits_and_gradients(model)
    with exactly(model) as exact_model:
        exact = logits_and_gradients(exact_model)
    fastpeft.accelerate(model)
    no_worse(logits_and_gradients(model), plain, exact, F32)


def test_factors_are_for_experts_that_take_them() -> None:
    model = tiny("mixtral")
    weight = ParameterWeight(experts_of(model)[0], "down_proj")
    assert not weight.takes_factors
    fastpeft.accelerate(model)
    assert weight.takes_factors
    fastpeft.unaccelerate(model)
    assert not weight.takes_factors


def test_a_gate_of_the_familys_own_is_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt_oss")
    plain = model(IDS).logits
    fastpeft.accelerate(model)
    for module in experts_of(model):
        monkeypatch.setattr(module, "_apply_gate", never)
    close(model(IDS).logits, plain)


def test_rows_for_every_expert_are_computed_for_the_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 gives each expert all tokens, as zeros where it is not chosen."""
    model = tiny("llama4")
    report = fastpeft.accelerate(model)
    rows = []

    def counted(x: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.append(x.shape[0])
        return grouped_linear(x, *args, **options)

    monkeypatch.setattr(experts, "grouped_linear", counted)
    model(IDS)
    assert report.served["experts", "grouped_linear (native)"] == len(experts_of(model)) == 2
    assert rows == [IDS.numel() * model.config.num_experts_per_tok] * 4
