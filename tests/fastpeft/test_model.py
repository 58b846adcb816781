"""The life of adapters on a model: PeftModel against PEFT's, step by step."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import LoHaConfig, LoraConfig, get_peft_model
from transformers import (
    LlamaForCausalLM,
)

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
X, llama, config, pair, add_both, assert_same_outputs, assert_same_state = (
    tools[name] for name in ("X", "llama", "config", "pair", "add_both", "assert_same_outputs", "assert_same_state")
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_the_life_of_adapters_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pair()
    outputs = [assert_same_outputs(ours, theirs)]
    assert_same_state(ours, theirs)
    ours.print_trainable_parameters()
    first = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert first == capsys.readouterr().out

    add_both(ours, theirs, "other", r=2, target_modules=["q_proj", "v_proj"])
    assert_same_state(ours, theirs)
    assert_same_outputs(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("other")
    assert_same_state(ours, theirs)
    outputs.append(assert_same_outputs(ours, theirs))
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    outputs.append(assert_same_outputs(ours, theirs))
    assert_same_state(ours, theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_same_state(ours, theirs)
        outputs.append(assert_same_outputs(ours, theirs))
        with torch.no_grad():
            assert torch.equal(outputs[-1], llama()(X).logits)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        model.set_requires_grad("other", False)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("other")
        model.delete_adapter("other")
    # Every layer has the same active adapters here; PEFT's layers without adapters then have none, which its own
    # get_model_status calls irregular.
    assert ours.get_model_status().active_adapters == ours.active_adapters == ["default"]
    assert theirs.get_model_status().active_adapters == "irregular"
    outputs.append(assert_same_outputs(ours, theirs))
    assert torch.equal(outputs[0], outputs[-1])
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 4, "steps that change nothing test nothing"


@pytest.mark.parametrize("names", [None, ["default"], ["default", "other"], ["other", "default"]])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_pefts_and_unmerging_gives_the_bytes_back(names: list[str] | None, safe: bool) -> None:
    ours, theirs = pair()
    add_both(ours, theirs, "other", r=2, target_modules=["q_proj", "v_proj"])
    base = {k: v.clone() for k, v in ours.state_dict().items() if "lora_" not in k}
    for model in (ours, theirs):
        model.merge_adapter(names, safe_merge=safe)
    assert_same_outputs(ours, theirs)
    assert_same_state(ours, theirs)
    changed = {k for k, v in base.items() if not torch.equal(ours.state_dict()[k], v)}
    assert any("q_proj" in k for k in changed)
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in base.items())
    assert_same_state(ours, theirs)
    merged, other = ours.merge_and_unload(safe_merge=safe, adapter_names=names), None
    other = theirs.merge_and_unload(safe_merge=safe, adapter_names=names)
    assert type(merged) is LlamaForCausalLM
    assert set(merged.state_dict()) == set(other.state_dict()) == set(llama().state_dict())
    assert not hasattr(merged, "peft_config")
    assert_same_outputs(merged, other)


def test_a_second_merge_goes_on_top_of_the_first() -> None:
    ours, _ = pair()
    ours.add_adapter("other", LoraConfig(**config(r=2)))
    ours.base_model.set_adapter(["default", "other"])
    together = ours(X).logits
    base = ours.model.model.layers[0].self_attn.q_proj.weight.clone()
    ours.merge_adapter(["default"])
    ours.merge_adapter(["other"])
    twice = {k: v.clone() for k, v in ours.state_dict().items()}
    assert ours.get_model_status().merged_adapters == ["default", "other"]
    assert_no_worse(ours(X).logits, together, copy.deepcopy(ours).double()(X).logits, together.abs() + 1)
    ours.unmerge_adapter()
    assert torch.equal(ours.model.model.layers[0].self_attn.q_proj.weight, base)
    ours.merge_adapter()
    assert all(torch.equal(twice[k], v) for k, v in ours.state_dict().items())


def test_the_status_of_methods_together() -> None:
    """PEFT has none of a mixed model."""
    model = get_peft_model(llama(), LoraConfig(**config()), mixed=True)
    model.add_adapter("other", LoHaConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    status = model.get_model_status()
    assert status.active_adapters == ["default", "other"]
    assert status.peft_types == {"default": "LORA", "other": "LOHA"}
    assert {layer.module_type for layer in model.get_layer_status()} <= {"lora.Linear", "lora.Embedding"}


def test_unload_and_switching_while_merged() -> None:
    ours, theirs = pair()
    add_both(ours, theirs, "other")
    for model in (ours, theirs):
        model.merge_adapter()
        model.set_adapter("other")  # unmerges first
    assert not ours.model.model.layers[0].self_attn.q_proj.merged
    assert_same_outputs(ours, theirs)
    ours.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        ours.delete_adapter("other")
    with ours.disable_adapter(), torch.no_grad():
        assert torch.equal(ours(X).logits, llama()(X).logits)
    with torch.no_grad():
        assert torch.equal(ours.unload()(X).logits, llama()(X).logits)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_safe_merge_that_fails_leaves_every_weight(how: str, bad: float) -> None:
    ours, _ = pair()
    last = ours.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.lora_A["default"].weight.fill_(bad)
        last.lora_B["default"].weight.fill_(bad)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"NaNs detected.*default.*layers\.1\.mlp\.down_proj"):
        getattr(ours, how)(safe_merge=True)
    after = ours.state_dict()
    assert list(after) == list(before)
    for key in before:
        assert_same_bits(after[key], before[key])
    assert ours.get_model_status().merged_adapters == []


def test_a_bias_that_cannot_be_merged_is_said_before_anything_is_written() -> None:
    ours, _ = pair(lora_bias=True)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match="the base layer has no bias"):
            merge()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ours.state_dict().values(), strict=True))


def test_merging_into_tied_embeddings_changes_one_of_them() -> None:
    model = get_peft_model(
        llama(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    )
    with torch.no_grad():
        y = model(X).logits
        merged = model.merge_and_unload()
        assert merged.config.tie_word_embeddings is False
        exact = copy.deepcopy(merged).double()(X).logits
        assert_no_worse(merged(X).logits, y, exact, exact.abs() + 1)
        assert torch.equal(merged.lm_head.weight, llama(tie_word_embeddings=True).lm_head.weight)


def test_a_mixed_batch_gives_each_row_its_adapter() -> None:
    ours, theirs = pair()
    add_both(ours, theirs, "other", r=2, target_modules=["q_proj", "v_proj"])
    names = ["other", "__base__", "default"]
    mixed = assert_same_outputs(ours, theirs, adapter_names=names)
    with torch.no_grad():
        for i, name in enumerate(names):
            if name == "__base__":
                with ours.disable_adapter():
                    alone = ours(X[i : i + 1]).logits
            else:
                ours.set_adapter(name)
                alone = ours(X[i : i + 1]).logits
            wide = llama().double() if name == "__base__" else copy.deepcopy(ours).double()
            assert_no_worse(mixed[i : i + 1], alone, wide(X[i : i + 1]).logits, alone.abs() + 1)
    generated = ours.generate(X, adapter_names=names, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0)
    assert torch.equal(generated, theirs.generate(
        X, adapter_names=names, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0))  # fmt: skip
    with pytest.raises(ValueError, match="non-existing adapter"):
        ours(X, adapter_names=["typo", "other", "other"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(X, adapter_names=["other"])
    with pytest.raises(ValueError, match="training mode"):
        ours.train()(X, adapter_names=names)
    ours.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        ours(X, adapter_names=names)


def test_a_merge_that_fails_halfway_takes_back_what_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    ours.add_adapter("other", LoraConfig(**config()))
    ours.merge_adapter(["other"])  # what was merged before stays merged
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    last = ours.model.model.layers[1].mlp.down_proj

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(last, "merged_weight", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours.merge_adapter(["default"])
    for key, value in ours.state_dict().items():
        assert_same_bits(value, before[key])
    assert ours.get_model_status().merged_adapters == ["other"]
