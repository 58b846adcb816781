"""Attributes that scripts reach on a model with LoRA: all public ones of PEFT's, but for those listed with a reason."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from peft_versions import needs_peft
from torch import nn

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
PLACES = {
    "model": "",
    "tuner": "base_model",
    "base": "base_model.model",
    "layer": "base_model.model.model.layers.0.self_attn.q_proj",
    "container": "base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    "head": "base_model.model.lm_head",
}
# By reason: `place.name`. Not there:
MISSING = {
    "prompt learning comes with a later issue": """
        model.base_model_prepare_inputs_for_generation model.get_prompt model.get_prompt_embedding_to_save
    """,
    "a step of putting an adapter in: `add_adapter` plans it as a whole": """
        tuner.inject_adapter layer.kwargs head.update head.init_modules head.check_module
        head.unload_and_optionally_merge_module
    """,
    "save_pretrained(path_initial_model_for_weight_conversion=...) does it": """
        tuner.subtract_mutated_init
    """,
    "a table of `fastpeft.utils`": """
        tuner.target_module_mapping
    """,
    "a start of LoRA is a class of methods/lora/start": """
        layer.corda_init layer.loftq_init layer.lora_ga_init layer.mica_init layer.olora_init layer.orthogonal_init
        layer.pissa_init layer.reset_lora_parameters
    """,
    "a variant of LoRA is a method of its own": """
        layer.lora_variant layer.lora_variants layer.resolve_lora_variant
    """,
    "a base weight is read and written by the layer's `base`": """
        layer.get_base_weight layer.set_base_weight layer.is_target_conv_1d_layer
    """,
    "not offered": """
        layer.ephemeral_gpu_offload
    """,
    "what no gradient reaches is known by the method": """
        layer.frozen_peft_weight_names
    """,
    "adapters come and go by name": """
        container.clear
    """,
}
# Names by which PEFT's and transformers' functions put adapters in and save them.
LATER: tuple[str, ...] = ()
# There, with another value:
OTHER = {
    "a name where PEFT begins with a list of one; both take either": "tuner.active_adapter",
    "the order in which methods name them": "layer.other_param_names",
    "a list of one where PEFT gives the name; both take either": "head.active_adapter",
}


def found(thing: Any) -> dict[str, Any]:
    """Public attributes beyond those of every module, with their values."""
    plain = {*dir(nn.Module()), *vars(nn.Module())}
    names = {name for name in {*dir(thing), *vars(thing)} - plain if not name.startswith("_")}
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def same(ours: Any, theirs: Any) -> bool:
    """Equal, where a value is plain data; of the same nature otherwise."""
    if callable(theirs):
        return callable(ours)
    if isinstance(theirs, dict):
        return isinstance(ours, Mapping) and ours.keys() == theirs.keys()
    plain = (str, int, float, bool, list, tuple, set, type(None))
    return bool(ours == theirs) if isinstance(theirs, plain) else type(ours).__name__ == type(theirs).__name__


@pytest.mark.filterwarnings("ignore")
def test_each_attribute_is_there_or_has_its_reason() -> None:
    needs_peft(">=0.21", "their models have other attributes, and ours are those of 0.21")
    models = tools["pair"](modules_to_save=["lm_head"])
    missing, other = set(), set()
    allowed = {name for names in MISSING.values() for name in names.split()}
    for place, path in PLACES.items():
        ours, theirs = (reduce(getattr, path.split(".") if path else [], model) for model in models)
        for name, value in found(theirs).items():
            if not hasattr(ours, name):
                missing.add(f"{place}.{name}")
            elif not same(getattr(ours, name), value):
                other.add(f"{place}.{name}")
    assert sorted(missing - allowed - {*LATER}) == []
    assert sorted(allowed - missing) == []
    assert other == {*OTHER.values()}


def test_they_say_what_pefts_say(capsys: pytest.CaptureFixture[str]) -> None:
    """With the adapter active, disabled, and beside another one."""
    needs_peft(">=0.21", "add_adapter freezes the active one's modules_to_save; 0.18: no supports_lora_conversion")
    for model in tools["pair"](modules_to_save=["lm_head"]):
        other = model.add_adapter("other", type(model.peft_config["default"])(r=2, target_modules=["up_proj"]))
        assert other is None
        assert model.base_model.prefix == "lora_"
        assert model.base_model.model is model.get_base_model()
        assert model.base_model.targeted_parameter_names == []
        assert model.special_peft_forward_args == {"adapter_names", "alora_offsets"}
        assert model.modules_to_save == {"lm_head"}
        assert model.active_peft_config is model.peft_config["default"]
        assert model.supports_lora_conversion()
        assert model.base_model.get_model_config(model)["model_type"] == "llama"
        assert model.has_active_enabled_adapter
        model.print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs


def test_has_active_enabled_adapter() -> None:
    ours, _ = tools["pair"]()
    assert ours.has_active_enabled_adapter
    with ours.disable_adapter():
        assert not ours.has_active_enabled_adapter
    ours.delete_adapter("default")
    assert not ours.has_active_enabled_adapter
