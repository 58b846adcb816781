"""Configurations of all methods: what can be made can be saved and loaded back equal, all else is refused at once."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.config.base import CLASSES, PeftConfig
from fastpeft.config.limits import MAX_NAMES
from fastpeft.config.patterns import first_match
from fastpeft.files.checks import AdapterFileError
from fastpeft.methods.registry import registry
from forms import by_form
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

registry()
METHODS = sorted(CLASSES)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["none", "all", "all-linear", "q_proj", "a" * 1001, "b" * 70000])
)
NUMBERS = st.one_of(
    st.integers(-2, 20), st.integers(), st.floats(), st.sampled_from([math.nan, math.inf, 1e30, 1e7, 10**30, 1 << 17])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
ODD = st.sampled_from(
    [object(), b"x", torch.zeros(2), 1j, {1: 2}, [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]], {"a": {1}}, {(1,)}]
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.sets(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=3), ODD,
)  # fmt: skip


def fields_of(name: str) -> list[str]:
    cls = CLASSES[name]
    return [f.name for f in dataclasses.fields(cls) if f.name not in (*cls.runtime_fields, "peft_type")]


def examples_of(name: str) -> list[dict[str, Any]]:
    own: Any = next((m.examples for m in registry().values() if m.peft_type.value == name), ())
    needed = {"total_step": 10} if name == "ADALORA" else {}
    return [{**needed, **example} for example in ({}, *own)]


def round_trip(config: PeftConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = PeftConfig.from_pretrained(folder)
    assert type(loaded) is type(config)
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
@settings(
    max_examples=by_form(short=12, full_form=400), deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data())
def test_what_can_be_made_can_be_loaded(name: str, data: st.DataObject) -> None:
    options = data.draw(st.sampled_from(examples_of(name)))
    changes = data.draw(st.dictionaries(st.sampled_from(fields_of(name)), VALUES, min_size=1, max_size=2))
    refused = ""
    try:
        round_trip(CLASSES[name](**{**options, **changes}))
    except (ValueError, NotImplementedError, TypeError) as error:
        refused = str(error)
    assert not refused or any(name in refused for name in (*changes, "task type", "task_type")), (changes, refused)


BAD = [
    ({"lora_alpha": math.nan}, "lora_alpha = nan: expected a number of magnitude at most 1e+06"),
    ({"lora_alpha": math.inf}, "lora_alpha = inf: expected"),
    ({"lora_alpha": 1e30}, "lora_alpha = 1e+30: expected"),
    ({"alpha_pattern": {"q": math.nan}}, "alpha_pattern['q'] = nan: expected"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] = 0: expected a positive integer of at most 65536"),
    ({"target_modules": ["x"] * 3 + [f"m{i}" for i in range(MAX_NAMES)]}, "at most 65536 entries"),
    ({"rank_pattern": {f"m{i}": 4 for i in range(MAX_NAMES + 1)}}, "at most 65536 entries"),
    ({"alpha_pattern": {f"m{i}.*": 4 for i in range(4097)}}, "at most 4096 expressions"),
    ({"target_modules": [f"m{i:0900}" for i in range(20000)]}, "expected at most 16777216"),
    ({"megatron_config": {"dtype": torch.float32}}, "megatron_config = torch.float32: expected what json can hold"),
    ({"lora_dropout": math.nan}, "lora_dropout = nan: expected"),
    ({"r": None}, "r = None: expected a number"),
    ({"layers_to_transform": {1, "a"}}, "expected texts alone or numbers alone in a set"),
    ({"layers_to_transform": [math.nan]}, "layers_to_transform = nan"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_made_changed_and_saved_under_one_set_of_limits(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fastpeft.LoraConfig(**options)
    model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), fastpeft.LoraConfig(target_modules=["0"], r=2))
    changed = fastpeft.LoraConfig(target_modules=["0"], r=2)
    for config in (changed, model.peft_config["default"]):
        vars(config).update({k: set(v) if k == "target_modules" else v for k, v in options.items()})
    for use in (
        lambda: model.add_adapter("other", changed),
        lambda: changed.save_pretrained(tmp_path / "config"),
        lambda: model.save_pretrained(tmp_path / "model"),
    ):
        with pytest.raises(ValueError, match="expected"):
            use()
    assert list(tmp_path.iterdir()) == []
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_would_be_refused_are_not_saved(tmp_path: Path, value: float) -> None:
    model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), fastpeft.LoraConfig(target_modules=["0"], r=2))
    model.save_pretrained(tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model.base_model.model[0].lora_A["default"].weight[0, 0] = value
    with pytest.raises(AdapterFileError, match=r"a is not written.*NaN or infinite values in base_model.*lora_A"):
        model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    fastpeft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a")


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(f"expert{i}", nn.Linear(2, 2, bias=False))


def test_as_many_names_as_experts(tmp_path: Path) -> None:
    """More than 4,096 names, each with a rank and an alpha of its own."""
    names = [f"expert{i}" for i in range(by_form(short=4200, full_form=20000))]
    count = by_form(short=50, full_form=20000)  # of the layers that there are
    own = dict.fromkeys(names, 2)
    config = fastpeft.LoraConfig(r=1, target_modules=names, rank_pattern=own, alpha_pattern=dict.fromkeys(names, 3))
    fastpeft.get_peft_model(Experts(count), config).save_pretrained(tmp_path)
    loaded = fastpeft.PeftModel.from_pretrained(Experts(count), tmp_path)
    assert loaded.peft_config["default"].rank_pattern == own
    layer = loaded.base_model.model.get_submodule(f"expert{count - 1}")
    assert (layer.r["default"], layer.scaling["default"]) == (2, 1.5)


def test_46_thousand_names_are_read_and_matched_in_time() -> None:
    count = by_form(short=9000, full_form=46080)
    names = [f"model.layers.{i // 960}.mlp.experts.{i % 960 // 3}.{'gud'[i % 3]}_proj" for i in range(count)]
    patterns = dict.fromkeys(names, 2)
    config = fastpeft.LoraConfig(target_modules=names, rank_pattern=patterns, alpha_pattern=patterns)
    begin = time.process_time()
    round_trip(config)
    assert first_match(patterns, names) == patterns
    assert time.process_time() - begin < count / 4000  # a quarter of it; names times names would take minutes
