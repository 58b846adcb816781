"""Adapters of whole models in files, both ways, and loads that fail."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
SMALL, X, llama, config, pair, add_both, assert_same_outputs, assert_same_state = (
    tools[name]
    for name in ("SMALL", "X", "llama", "config", "pair", "add_both", "assert_same_outputs", "assert_same_state")
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Classes:
    """Models with a head, and the options that make it new."""

    @staticmethod
    def sequence() -> nn.Module:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()

    @staticmethod
    def token() -> nn.Module:
        torch.manual_seed(0)
        return BertForTokenClassification(BertConfig(**SMALL, num_labels=3)).eval()


@pytest.mark.parametrize(
    ("make", "task", "cls"),
    [
        (Classes.sequence, "SEQ_CLS", "PeftModelForSequenceClassification"),
        (Classes.token, "TOKEN_CLS", "PeftModelForTokenClassification"),
        (llama, "CAUSAL_LM", "PeftModelForCausalLM"),
        (llama, "FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
        (llama, None, "PeftModel"),
    ],
)
def test_tasks_and_files_both_ways(make: Any, task: str | None, cls: str, tmp_path: Any) -> None:
    targets = ["q_proj", "down_proj"] if make is llama else ["query", "dense"]
    ours, theirs = pair(make, task_type=task, target_modules=targets)
    assert type(ours).__name__ == type(theirs).__name__ == cls
    add_both(ours, theirs, "other", task_type=task, target_modules=targets)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "modules_to_save" in name:
                    p.add_(0.5)
    assert_same_outputs(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for name in ("default", "other"):
        folder = "." if name == "default" else name
        a = PeftModel.from_pretrained(make(), tmp_path / "theirs" / folder, adapter_name=name).eval()
        b = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours" / folder), adapter_name=name).eval()
        assert type(a).__name__ == type(b).__name__ == cls
        for model in (ours, theirs):
            model.set_adapter(name)
        assert torch.equal(assert_same_outputs(a, b), assert_same_outputs(ours, theirs))
        assert_same_state(a, b)
        assert not any(p.requires_grad for p in a.parameters())
    # Beside another adapter, and trainable.
    a.load_adapter(tmp_path / "ours", "second", is_trainable=True)
    b.load_adapter(str(tmp_path / "ours"), "second", is_trainable=True)
    assert_same_state(a, b)
    state, theirs_state = get_peft_model_state_dict(a, adapter_name="second"), get_peft_model_state_dict(ours)
    assert set(state) == set(theirs_state)
    assert all(torch.equal(state[k], theirs_state[k]) for k in state)


def test_loading_a_file_that_does_not_fit_changes_nothing(tmp_path: Any) -> None:
    pair()[0].save_pretrained(tmp_path)
    wider = {**SMALL, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**wider, num_key_value_heads=1))
    before = {n: (type(m), m.training) for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(model, tmp_path)
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert not hasattr(model, "peft_config")
    ours, _ = pair()
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(ValueError, match="header"):
        ours.load_adapter(tmp_path, "other")
    assert list(ours.peft_config) == ["default"]
    assert list(ours.state_dict()) == list(state)


def test_an_adapter_is_planned_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.inject import plan as inject
    from fastpeft.saving import folder
    from fastpeft.saving import load as loading

    pair()[0].save_pretrained(tmp_path)
    calls: list[str] = []
    for module, name in ((loading, "plan_injection"), (inject, "find_joined"), (folder, "check_config"),
                         (loading, "unpacked")):  # fmt: skip
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))
    model = PeftModel.from_pretrained(llama(), tmp_path)
    assert calls == ["check_config", "plan_injection", "find_joined", "unpacked"]
    calls.clear()
    model.load_adapter(tmp_path, "other")
    assert calls == ["check_config", "plan_injection", "find_joined", "unpacked"]


def test_a_load_that_fails_late_changes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.saving import load as loading

    pair()[0].save_pretrained(tmp_path)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loading, "fill", fails)
    model = llama()
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(OSError, match="the disk is gone"):
        PeftModel.from_pretrained(model, tmp_path)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert [n for n, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    ours, _ = pair()
    state = list(ours.state_dict())
    with pytest.raises(OSError, match="the disk is gone"):
        ours.load_adapter(tmp_path, "other")
    assert list(ours.peft_config) == ["default"]
    assert list(ours.state_dict()) == state


def test_a_model_that_was_loaded_half_precision_keeps_pefts_dtypes(tmp_path: Any) -> None:
    pair()[0].save_pretrained(tmp_path)
    for autocast in (True, False):
        a = PeftModel.from_pretrained(llama().bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
        b = peft.PeftModel.from_pretrained(llama().bfloat16(), str(tmp_path), autocast_adapter_dtype=autocast)
        for name, p in b.named_parameters():
            assert dict(a.named_parameters())[name].dtype == p.dtype, (autocast, name)


def test_an_adapter_on_the_meta_device_waits_for_its_values() -> None:
    ours, _ = pair()
    values = get_peft_model_state_dict(ours)
    empty = get_peft_model(llama(), LoraConfig(**config()), low_cpu_mem_usage=True).eval()
    assert {p.device.type for n, p in empty.named_parameters() if "lora_" in n} == {"meta"}
    result = fastpeft.set_peft_model_state_dict(empty, values, low_cpu_mem_usage=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_bits(empty(X).logits, ours(X).logits)


@pytest.mark.parametrize("added", [False, True])
def test_tensors_of_another_size_are_left_out_on_demand(added: bool, tmp_path: Path) -> None:
    """Tensors that are left out start as in PEFT, for the same seed."""
    get_peft_model(llama(), LoraConfig(**config())).save_pretrained(tmp_path)
    base = llama()
    base.model.layers[1].mlp.down_proj = nn.Linear(30, 16, bias=False)
    with pytest.raises(ValueError, match=r"size mismatch for: .*layers\.1\.mlp\.down_proj\.lora_A"):
        PeftModel.from_pretrained(base, tmp_path)
    states = []
    for library in (fastpeft, peft):
        model: Any = copy.deepcopy(base)
        torch.manual_seed(5)
        load = partial(library.PeftModel.from_pretrained, model)
        if added:
            model = library.get_peft_model(model, library.LoraConfig(**config(target_modules=["q_proj"])), "first")
            load = partial(model.load_adapter, adapter_name="default")
        with pytest.warns(UserWarning, match=r"down_proj\.lora_A"):
            loaded = load(model_id=tmp_path, ignore_mismatched_sizes=True)
        states.append(library.get_peft_model_state_dict(model if added else loaded))
    assert {k: v.tolist() for k, v in states[0].items()} == {k: v.tolist() for k, v in states[1].items()}
