"""Adapters that PEFT made: they load here and compute what PEFT computed; what is saved here loads in PEFT."""

from __future__ import annotations

import json
import runpy
import warnings
from pathlib import Path

import fastpeft
import pytest
import torch
from fastpeft.config.base import CONFIG_NAME
from fastpeft.saving.folder import SAFETENSORS_NAME, load_adapter_file, open_adapter
from safetensors import safe_open
from safetensors.torch import load_file

from peft_kernels.testing import assert_no_worse, assert_same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
zoo = runpy.run_path(str(GOLDEN / "zoo.py"))


def load(name: str, folder: Path | None = None, **kwargs: object) -> fastpeft.PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        base = zoo["base_model"](case=name)
        return fastpeft.PeftModel.from_pretrained(base, folder or GOLDEN / "peft" / name, **kwargs).eval()


def load_with_peft(name: str, folder: Path) -> torch.nn.Module:
    if zoo["CASES"][name].get("peft_type") == "ADAMSS":
        pytest.importorskip("sklearn", reason="PEFT clusters with scikit-learn")
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out|.*save_precomputed_indices")
        return peft.PeftModel.from_pretrained(zoo["base_model"](case=name), folder).eval()


def expectations(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "peft" / name / "expected.safetensors")


def merges(name: str) -> bool:
    with safe_open(GOLDEN / "peft" / name / "expected.safetensors", "pt") as file:
        return "merged" in file.keys()  # noqa: SIM118


CASES = list(zoo["CASES"])
MERGED = [name for name in CASES if merges(name)]


# Parameters that PEFT gives a gradient that is not its output's derivative, by parts of their names. What we give them,
# test_laws.py checks. C3A: its backward transforms the wrong way, which all that comes before sees. LoHa: the backward
# of its Tucker form takes the other product's core. An attention's out_proj: one of two additions is not recorded.
WRONG_IN_PEFT = {
    "c3a": (".up.", ".down."),
    "c3a_pattern": (".up.", ".down."),
    "loha_conv_effective": (".hada_w1_a.", ".hada_w2_a."),
    "attention": (".out_proj.",),
    "attention_rslora": (".out_proj.",),
}


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max()) if exact.any() else 0.0


def no_worse(
    actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, terms: float = 0.0, luck: float = 0.0
) -> None:
    """The law for a deep model: each element is held to eager's largest error in the tensor, not to its luck there.

    Errors come in from every layer, so the terms behind an element are as large as the tensor's largest elements, or as
    `terms` where it has one element only; and what rounding does in one layer goes through all that follow, which is
    eight. luck: eager's largest relative error in the tensors of the same name in other layers.
    """
    if not exact.numel():  # AdaLoRA can leave no rank
        assert actual.shape == exact.shape
        return
    largest = exact.abs().max().clamp(min=terms if exact.numel() == 1 else 0.0).expand(exact.shape)
    worst = (eager.double() - exact).abs().max().clamp(min=luck * float(exact.abs().max()))
    assert_no_worse(actual, (exact + worst).to(eager.dtype), exact, 8 * largest)


@pytest.mark.parametrize("name", CASES)
def test_keys_and_bytes_as_in_the_file(name):
    expected = load_file(GOLDEN / "peft" / name / SAFETENSORS_NAME)
    state = fastpeft.get_peft_model_state_dict(load(name))
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert_same_bits(value, expected[key])


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_peft(name):
    expected = expectations(name)
    model = load(name, is_trainable=True).eval()
    output = zoo["call"](model, name)
    no_worse(output, expected["output"], expected["output64"])
    zoo["loss_of"](output).backward()
    # Several names for what layers share.
    names = dict(model.named_parameters(remove_duplicate=False))
    gradients = {key.removeprefix("grad:"): value for key, value in expected.items() if key.startswith("grad:")}
    assert gradients.keys() <= names.keys()
    trained = {id(p) for p in names.values() if p.requires_grad and p.grad is not None}
    assert trained == {id(names[key]) for key in gradients}
    terms = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    luck: dict[str, float] = {}
    for key, value in gradients.items():
        luck[kind_of(key)] = max(luck.get(kind_of(key), 0.0), relative_error(value, expected[f"grad64:{key}"]))
    for key, value in gradients.items():
        if not any(wrong in key for wrong in WRONG_IN_PEFT.get(name, ())):
            no_worse(names[key].grad, value, expected[f"grad64:{key}"], terms, luck[kind_of(key)])


def kind_of(key: str) -> str:
    """The part of their names that the parameters of all layers share: `lora_A.weight`."""
    before, _, after = key.partition(".default")
    return before.rpartition(".")[2] + after


@pytest.mark.parametrize("name", MERGED)
def test_merged_output_is_that_of_peft(name):
    expected = expectations(name)
    merged = load(name).merge_and_unload()
    no_worse(zoo["call"](merged, name), expected["merged"], expected["output64"])


@pytest.mark.parametrize("name", CASES)
def test_saving_writes_the_same_files_and_peft_loads_them(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    ours, theirs = json.loads((tmp_path / CONFIG_NAME).read_text()), json.loads(
        (GOLDEN / "peft" / name / CONFIG_NAME).read_text()
    )  # fmt: skip
    for content in (ours, theirs):
        content.pop("auto_mapping")  # names the module that the model's class was imported from
        content.pop("peft_version")
        for key in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(content.get(key), list):
                content[key] = sorted(content[key])
    assert ours == theirs
    _, state = load_adapter_file(tmp_path)
    expected = load_file(GOLDEN / "peft" / name / SAFETENSORS_NAME)
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert_same_bits(value, expected[key])
    assert open_adapter(tmp_path).header.metadata == {"format": "pt"}
    # Not the golden file's output: the last bits of what PEFT computes differ between machines.
    theirs = load_with_peft(name, GOLDEN / "peft" / name)
    assert_same_bits(zoo["call"](load_with_peft(name, tmp_path), name).detach(), zoo["call"](theirs, name).detach())


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
