"""A model that is wrapped again, and what a configuration says of its version."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft import LoraConfig, get_peft_model
from fastpeft.config import version
from torch import nn


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the order of sums, which kernels have another of."""
    return bool((a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * b.abs().max())


def test_an_adapter_of_the_same_name_is_replaced() -> None:
    """As a notebook's cell does that runs twice: the model computes with the new adapter alone."""
    x, base = torch.randn(3, 6), net()
    plain = base(x)
    get_peft_model(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    with pytest.warns(UserWarning, match="You are trying to modify a model with PEFT for a second time"):
        again = get_peft_model(base, LoraConfig(target_modules=["0"], r=3))
    assert same(again(x), plain)
    assert again.base_model.model[0].lora_A["default"].weight.shape == (3, 6)
    assert list(again.peft_config) == ["default"]
    assert sum(p.requires_grad for p in again.parameters()) == 2


def test_an_error_leaves_the_first_one() -> None:
    x, base = torch.randn(3, 6), net()
    first = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    y = first(x)
    with pytest.warns(UserWarning, match="second time"), pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, LoraConfig(target_modules=["nothing"]))
    assert torch.equal(first(x), y)
    assert list(first.peft_config) == ["default"]


def test_a_peft_model_inside_of_another() -> None:
    x, base = torch.randn(3, 6), net()
    inner = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    y = inner(x)
    with pytest.warns(UserWarning, match="second time"):
        outer = get_peft_model(inner, LoraConfig(target_modules="base_model.model.1", r=2))
    assert same(outer(x), y)


def test_what_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"foo": 1}))
    for error in (TypeError, fastpeft.AdapterFileError):
        with pytest.raises(error, match=r"The LoraConfig config .* is missing required keys: {'peft_type'}"):
            LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_a_library_that_a_configuration_names_is_not_imported(tmp_path: Path, auto: str) -> None:
    mapping = {"parent_library": "antigravity", "base_model_class": "system"}
    LoraConfig(base_model_name_or_path="x/y", auto_mapping=mapping).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'antigravity' which is not in the import allowlist"):
        getattr(fastpeft, auto).from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules


def test_positional_arguments_of_a_seq2seq_model() -> None:
    model = get_peft_model(net(), LoraConfig(target_modules=["0"], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(TypeError, match="positional"):
        model.generate(torch.ones(1, 2))


def test_the_version_of_a_development_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpeft.config, "__version__", "0.22.0.dev0")
    monkeypatch.setattr(fastpeft.config, "_get_commit_hash", lambda package: "abc" if package == "peft" else None)
    assert LoraConfig().peft_version == "0.22.0.dev0@abc"

    class Installed:
        def read_text(self, name: str) -> Any:
            return json.dumps({"url": "x", "vcs_info": {"vcs": "git", "commit_id": "12ab"}})

    monkeypatch.setattr(version.metadata, "distribution", lambda package: Installed())
    assert version.commit_of("peft") == "12ab"
