"""The life of an adapter, for every method and variant: it is added, switched, mixed, merged, trained, copied.

What a method computes, the laws say (test_laws.py); here is what happens to its tensors in a model.
"""

from __future__ import annotations

import copy
import pickle
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.config.types import PeftType
from fastpeft.weights.quantize import dequantize_model
from torch import nn

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("life_tools.py")))
CASES = tools["CASES"]
IDS = tools["IDS"]
LORA = tools["LORA"]
MAIN = tools["MAIN"]
assert_matches = tools["assert_matches"]
assert_same_state = tools["assert_same_state"]
exactly = tools["exactly"]
layers_of = tools["layers_of"]
loss_of = tools["loss_of"]
run = tools["run"]
scatter = tools["scatter"]
state_of = tools["state_of"]
tiny = tools["tiny"]
train = tools["train"]
Tiny = tools["Tiny"]
Tiny.__module__ = __name__  # where unpickling finds it
Case = Any
every = pytest.mark.parametrize("case", CASES, ids=repr)
main = pytest.mark.parametrize("case", MAIN, ids=repr)
pytestmark = pytest.mark.filterwarnings("ignore::fastpeft.config.types.PeftWarning", "ignore::UserWarning")


def test_every_method_is_here() -> None:
    from fastpeft.methods.registry import registry

    others = {"ADAPTION_PROMPT", "SHADOW", "XLORA"}  # need an attention, a decoder, other adapters' files
    assert {case.kind.method.peft_type.value for case in CASES} == {name.value for name in registry()} - others


@every
def test_switching_disabling_and_deleting(case: Case) -> None:
    base = run(tiny())
    model = case.model(name="a")
    first = run(model)
    assert not torch.equal(first, base)
    with model.disable_adapter():
        disabled = run(model)
    assert_same_bits(run(model), first)

    model.add_adapter("b", case.config())
    assert not any(m.training for layer in layers_of(model) for m in layer.modules() if type(m) is nn.Dropout)
    scatter(model, "b", 2)
    other = next(c for c in (LORA, *MAIN) if c.kind.method is not case.kind.method)
    model.add_adapter("c", other.config())
    scatter(model, "c", 3)
    assert_same_bits(run(model), first)
    model.set_adapter("b")
    assert not torch.equal(run(model), first)
    model.set_adapter("c")
    assert not torch.equal(run(model), first)
    model.set_adapter("a")
    assert_same_bits(run(model), first)

    model.delete_adapter("b")
    model.delete_adapter("c")
    assert not [key for key in model.state_dict() if ".b." in key or key.endswith((".b", ".c")) or ".c." in key]
    assert_same_bits(run(model), first)
    model.base_model.disable_adapter_layers()
    assert_same_bits(run(model), disabled)
    model.base_model.enable_adapter_layers()
    assert_same_bits(run(model), first)
    assert_same_bits(run(model.unload()), base)


@every
def test_only_active_adapters_train(case: Case) -> None:
    model = case.model(name="a")
    model.add_adapter("b", case.config())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.endswith(".a") or ".a." in n for n in trained)
    model.set_requires_grad("a", False)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.set_requires_grad("a")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("b", inference_mode=True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@every
def test_each_row_of_a_batch_has_its_own_adapter(case: Case) -> None:
    model = case.model(name="a")
    model.add_adapter("b", case.config())
    scatter(model, "b", 2)
    rows = ["b", "__base__", "a", "b"]
    mixed = run(model, adapter_names=rows)
    wide = copy.deepcopy(model).double()
    for name in ("a", "b", "__base__"):
        own = [i for i, row in enumerate(rows) if row == name]
        alone = []
        for each in (model, wide):
            if name == "__base__":
                with each.disable_adapter():
                    alone.append(run(each, IDS[own]))
            else:
                each.set_adapter(name)
                alone.append(run(each, IDS[own]))
        assert_matches(mixed[own], *alone)


@every
def test_merging_and_taking_back(case: Case) -> None:
    model = case.model()
    before, output, exact = state_of(model), run(model), exactly(model)
    if not case.merges:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        assert_same_state(model, before)
        return
    model.merge_adapter(safe_merge=True)
    assert_matches(run(model), output, exact)
    model.unmerge_adapter()
    assert_same_state(model, before)
    assert_same_bits(run(model), output)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not layers_of(merged)
    assert merged.state_dict().keys() >= tiny().state_dict().keys()
    assert_matches(run(merged), output, exact)


@main
def test_two_active_adapters_of_two_kinds(case: Case) -> None:
    model = case.model(name="a")
    other = next(c for c in (LORA, *MAIN) if c.kind.method is not case.kind.method)
    model.add_adapter("b", other.config())
    scatter(model, "b", 2)
    alone = run(model)
    model.set_adapter(["a", "b"])
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".b" in n}
    output, exact, before = run(model), exactly(model), state_of(model)
    assert not torch.equal(output, alone)
    if case.merges:
        model.merge_adapter()
        assert_matches(run(model), output, exact)
        model.unmerge_adapter()
    model.delete_adapter("a")
    model.add_adapter("a", case.config())
    model.set_adapter(["a", "b"])
    assert model.state_dict().keys() == before.keys()


@every
def test_a_safe_merge_of_a_broken_adapter_changes_nothing(case: Case) -> None:
    model = case.model()
    if not case.merges:
        pytest.skip("it has no merged form")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "default" in key.split("."):
                parameter.fill_(float("nan"))
    before = state_of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            merge(safe_merge=True)
        assert_same_state(model, before)
        assert all(not layer.merged_adapters for layer in layers_of(model))


@every
def test_copies_and_pickles_are_independent(case: Case) -> None:
    model = case.model()
    output = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(run(other), output)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
        scatter(other, "default", 9)
        assert not torch.equal(run(other), output)
        assert_same_bits(run(model), output)


@every
def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    model = case.model().train()
    gradients = []
    for checkpointing in (False, True):
        model.get_base_model().checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        loss_of(model(IDS)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        assert_same_bits(gradients[1][name], value)


DROPOUTS = [(c, field) for c in MAIN for field in c.config().to_dict() if field.endswith("dropout")]


@pytest.mark.parametrize(("case", "field"), DROPOUTS, ids=repr)
def test_dropout_acts_in_training_alone(case: Case, field: str) -> None:
    if repr(case).startswith("_Bat"):
        with pytest.raises(ValueError, match=f"`{field}` cannot act"):
            fastpeft.get_peft_model(tiny(), case.config(**{field: 0.5}))
        return
    model = fastpeft.get_peft_model(tiny(), case.config(**{field: 0.5}))
    scatter(model, "default", 1).eval()
    assert_same_bits(run(model), run(case.model()))
    model.train()
    outputs = {run(model).sum().item() for _ in range(12)}
    if repr(case).startswith("Supertuning") and not case.kind.values.get("r"):
        assert len(outputs) == 1  # it has no LoRA
    else:
        assert len(outputs) > 1


@every
def test_float32_adapters_on_a_bfloat16_base(case: Case) -> None:
    model = case.model(dtype=torch.bfloat16)
    method = layers_of(model)[0].methods["default"]
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if method.autocast else torch.bfloat16}
    output = run(model)
    assert output.dtype == torch.bfloat16
    wide = run(copy.deepcopy(model).double())
    # As far from float64 as a merged layer or the frozen model is: bfloat16 has 8 bits.
    assert (output - wide).abs().max() < 0.1 * wide.abs().max()
    train(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model(IDS)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", [case for case in MAIN if case.place == "linear"], ids=repr)
def test_a_4bit_base_is_its_decoded_weight(case: Case, tmp_path: Path) -> None:
    if case.kind.method.peft_type == PeftType.LN_TUNING:
        with pytest.raises(ValueError, match="quantised weight cannot be trained"):
            fastpeft.get_peft_model(fastpeft.quantize_model(tiny()), case.config())
        return
    model = fastpeft.get_peft_model(fastpeft.quantize_model(tiny()), case.config())
    scatter(model, "default", 1).eval().save_pretrained(tmp_path)
    if any(layer.base_edits for layer in layers_of(model)):
        assert torch.isfinite(run(model)).all()
        return  # its base is quantised again after the change
    dense = dequantize_model(fastpeft.quantize_model(tiny()))
    plain = fastpeft.PeftModel.from_pretrained(dense, tmp_path, is_trainable=True).eval()
    wide = copy.deepcopy(plain).double()
    assert_matches(run(model), run(plain), run(wide))
    ours, theirs, exact = gradients(model), gradients(plain), gradients(wide)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_matches(value, theirs[name], exact[name])
    again = fastpeft.PeftModel.from_pretrained(fastpeft.quantize_model(tiny()), tmp_path).eval()
    assert_same_bits(run(again), run(model))
