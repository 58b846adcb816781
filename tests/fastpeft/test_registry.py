"""A method from outside of the package."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.config.base import CLASSES
from fastpeft.methods.method import METHODS, Method
from fastpeft.methods.registry import every_method
from fastpeft.testing import SAMPLE_BASES, add_adapter, assert_law, make_layer
from torch import nn


@pytest.fixture
def restored() -> Iterator[None]:
    """The registry is afterwards as it was before."""
    methods, classes = dict(every_method()), dict(CLASSES)
    yield
    for now, before in ((METHODS, methods), (CLASSES, classes)):
        now.clear()
        now.update(before)  # type: ignore[arg-type]


def gain_method(peft_type: str) -> type[Method]:
    """A method that multiplies a layer's output by trained numbers."""

    @dataclass
    class GainConfig(fastpeft.TargetConfig, own_type=peft_type):
        start: float = 1.0

    class Gain(Method, config=GainConfig):
        prefix = "gain_"
        tensors = ("gain_values",)

        def make_state(self, config: Any, info: Any, shared: Any) -> Any:
            return {"gain_values": nn.Parameter(torch.full((info.out_features,), config.start))}

        def merged(self, s: Any, shared: Any, w: Any, b: Any) -> Any:
            gain = s.gain_values.to(w.dtype)
            return w * gain[:, None], None if b is None else b * gain

        def output(self, s: Any, shared: Any, x: Any, y: Any, inner: Any) -> Any:
            return y * s.gain_values

    return Gain


@pytest.mark.usefixtures("restored")
def test_a_method_of_ones_own_is_served_like_any_other(tmp_path: Path) -> None:
    gain = fastpeft.register(gain_method("POLY"))
    config = gain.config_class(target_modules=["0"], start=2.0)  # type: ignore[call-arg]
    model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), config)
    base = model.base_model.model[0].base_layer
    x = torch.randn(2, 3)
    assert torch.equal(model(x), 2 * base(x))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.0.gain_values.default"
    ]
    model.save_pretrained(tmp_path)
    again = fastpeft.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path)
    assert type(again.peft_config["default"]) is gain.config_class
    assert torch.equal(again(x), model(x))
    assert torch.equal(model.merge_and_unload()(x), again(x))  # powers of two are exact


@pytest.mark.usefixtures("restored")
def test_the_law_can_be_checked_for_it() -> None:
    gain, layer = fastpeft.register(gain_method("POLY")), make_layer("linear")
    add_adapter(layer, "a", gain(), gain.config_class(start=-0.5))  # type: ignore[call-arg]
    assert_law(layer, ["a"], SAMPLE_BASES["linear"].input())


@pytest.mark.usefixtures("restored")
def test_it_takes_the_place_of_the_package_s_method_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that one's file has not been imported when it is registered, and is later."""
    there = METHODS[fastpeft.PeftType.MISS]

    @functools.cache
    def load_all() -> None:
        METHODS[fastpeft.PeftType.MISS], CLASSES["MISS"] = there, there.config_class

    monkeypatch.setattr("fastpeft.methods.registry.load_all", load_all)
    gain = fastpeft.register(gain_method("MISS"))
    load_all()
    config = fastpeft.PeftConfig.from_peft_type(peft_type="MISS", start=2.0)
    assert type(config) is gain.config_class
    assert type(fastpeft.method_of(config)) is gain


@pytest.mark.usefixtures("restored")
def test_a_class_without_a_type_is_refused() -> None:
    class Nameless(Method):
        pass

    with pytest.raises(TypeError, match=r"Nameless must be a class X\(Method, config=XConfig\)"):
        fastpeft.register(Nameless)
