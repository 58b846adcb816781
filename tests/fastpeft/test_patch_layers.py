"""`patch(layers=True, loss=True)`: quicker decoder layers and a loss by chunks in models of real PEFT."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

import fastpeft
import peft
import pytest
from fastpeft import PeftWarning
from fastpeft.compat.patch.classes import patched
from torch import nn

tools = runpy.run_path(str(Path(__file__).with_name("patch_tools.py")))
llama, in_4bit, model_of, step, assert_same = (
    tools[n] for n in ("llama", "in_4bit", "model_of", "step", "assert_same")
)


@pytest.fixture(autouse=True)
def _unpatch() -> Iterator[None]:
    yield
    fastpeft.unpatch()
    assert not patched


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_quicker_layers(kind: str) -> None:
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(base=in_4bit(llama()) if kind == "4bit" else llama(), target_modules=["q_proj", "v_proj"])
    loss, grads = step(model.train())
    classes = [type(m) for m in model.modules()]
    report = fastpeft.patch(model, layers=True, loss=True)
    found, own = step(model)
    assert_same(found, loss)
    for a, b in zip(own, grads, strict=True):
        assert_same(a, b)
    assert report.ours >= 4
    assert not report.calls
    assert "loss: by chunks in 1 model(s), 1 times" in str(report)
    fastpeft.unpatch(model)
    assert [type(m) for m in model.modules()] == classes


def test_quicker_layers_of_models_that_are_made_later() -> None:
    loss, _ = step(model_of(target_modules=["q_proj"]))
    fastpeft.patch(layers=True, loss=True)
    try:
        model = model_of(target_modules=["q_proj"])
        classes = {type(m).__name__ for m in model.modules()}
        found, _ = step(model)
        with pytest.warns(PeftWarning, match="Sequential keeps its layers and its loss"):
            peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    finally:
        fastpeft.unpatch()
    assert "FastLlamaMLP" in classes
    assert_same(found, loss)
    assert "FastLlamaMLP" not in {type(m).__name__ for m in model.modules()}
