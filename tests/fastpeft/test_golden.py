"""Adapters that PEFT made: they load here and compute what PEFT computed; what is saved here loads in PEFT."""

from __future__ import annotations

import json
import runpy
import warnings
from pathlib import Path

import fastpeft
import pytest
import torch
from fastpeft.checkpoint import CONFIG_NAME, SAFETENSORS_NAME, load_adapter_file, open_adapter
from safetensors.torch import load_file

from peft_kernels.testing import assert_no_worse, assert_same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
zoo = runpy.run_path(str(GOLDEN / "zoo.py"))
CASES = sorted(zoo["CASES"])


def load(name: str, folder: Path | None = None, **kwargs: object) -> fastpeft.PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        base = zoo["base_model"]()
        return fastpeft.PeftModel.from_pretrained(base, folder or GOLDEN / "peft" / name, **kwargs).eval()


def no_worse(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """The law for a deep model: each element is held to eager's largest error in the tensor, not to its luck there.

    Errors come in from every layer, so the terms behind an element are as large as the tensor's largest elements.
    """
    largest = exact.abs().max().expand(exact.shape)
    worst = (eager.double() - exact).abs().max()
    assert_no_worse(actual, (exact + worst).to(eager.dtype), exact, largest)


@pytest.mark.parametrize("name", CASES)
def test_keys_and_bytes_as_in_the_file(name):
    model = load(name)
    expected = load_file(GOLDEN / "peft" / name / SAFETENSORS_NAME)
    state = fastpeft.get_peft_model_state_dict(model)
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert_same_bits(value, expected[key])


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_peft(name):
    expected = load_file(GOLDEN / "peft" / name / "expected.safetensors")
    model = load(name, is_trainable=True).eval()
    output = model(zoo["inputs"]())
    no_worse(output, expected["output"], expected["output64"])
    zoo["loss_of"](output).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert {f"grad:{n}" for n in gradients} == {key for key in expected if key.startswith("grad:")}
    for key, value in gradients.items():
        no_worse(value, expected[f"grad:{key}"], expected[f"grad64:{key}"])


@pytest.mark.parametrize("name", CASES)
def test_merged_output_is_that_of_peft(name):
    expected = load_file(GOLDEN / "peft" / name / "expected.safetensors")
    merged = load(name).merge_and_unload()
    output = merged(zoo["inputs"]())
    no_worse(output, expected["merged"], expected["output64"])


@pytest.mark.parametrize("name", CASES)
def test_saving_writes_the_same_files(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    ours, theirs = json.loads((tmp_path / CONFIG_NAME).read_text()), json.loads(
        (GOLDEN / "peft" / name / CONFIG_NAME).read_text()
    )  # fmt: skip
    for content in (ours, theirs):
        content.pop("auto_mapping")  # names the module that the model's class was imported from
        content.pop("peft_version")
        for key in ("target_modules", "exclude_modules"):
            if isinstance(content[key], list):
                content[key] = sorted(content[key])
    assert ours == theirs
    _, state = load_adapter_file(tmp_path)
    expected = load_file(GOLDEN / "peft" / name / SAFETENSORS_NAME)
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert_same_bits(value, expected[key])
    assert open_adapter(tmp_path).header.metadata == {"format": "pt"}


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_is_saved_here(name, tmp_path):
    peft = pytest.importorskip("peft")
    load(name).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        theirs = peft.PeftModel.from_pretrained(zoo["base_model"](), tmp_path).eval()
    assert_same_bits(theirs(zoo["inputs"]()).detach(), expected_output(name))


def expected_output(name: str) -> torch.Tensor:
    """What PEFT computes here: its last bits differ between machines, so the golden file's may be others."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        model = peft.PeftModel.from_pretrained(zoo["base_model"](), GOLDEN / "peft" / name).eval()
    return model(zoo["inputs"]()).detach()


@pytest.mark.parametrize("name", ["linear", "everything", "bias_all"])
def test_another_adapter_name(name, tmp_path):
    expected = load_file(GOLDEN / "peft" / name / SAFETENSORS_NAME)
    model = load(name, adapter_name="train")  # an attribute of every module
    assert fastpeft.get_peft_model_state_dict(model, adapter_name="train").keys() == expected.keys()
    model.save_pretrained(tmp_path)
    _, state = load_adapter_file(tmp_path, subfolder="train")
    for key, value in state.items():
        assert_same_bits(value, expected[key])


@pytest.mark.parametrize("name", ["linear", "patterns", "conv1d_gpt2"])
def test_injected_models_take_the_same_files(name):
    """diffusers and transformers inject into their own model and set the state dict, without a PeftModel."""
    config, state = load_adapter_file(GOLDEN / "peft" / name)
    model = zoo["base_model"]()
    fastpeft.inject_adapter_in_model(fastpeft.PeftConfig.from_dict(config), model, "a")
    result = fastpeft.set_peft_model_state_dict(model, state, "a")
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert_same_bits(model(zoo["inputs"]()).detach(), load(name)(zoo["inputs"]()).detach())
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    assert fastpeft.get_peft_model_state_dict(model, adapter_name="a").keys() == bare.keys()
    assert fastpeft.set_peft_model_state_dict(model, bare, "a").unexpected_keys == []
