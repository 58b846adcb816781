"""Modules that PEFT has and that no file here stands for: `compat/peft_names.py` makes them from one table."""

import importlib
import importlib.util
import pickle
import subprocess
import sys
from functools import partial
from types import ModuleType
from unittest import mock

import fastpeft
import pytest
from fastpeft.compat import peft_names
from fastpeft.methods.registry import registry


@pytest.mark.parametrize("path", sorted(peft_names.PATHS))
def test_each_row_has_a_spec_and_its_names(path):
    name = f"fastpeft.{path}"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.name == name
    module = importlib.import_module(name)
    assert module is sys.modules[name]
    assert module.__spec__.name == name
    assert importlib.util.find_spec(name) is module.__spec__
    below = {p for p in peft_names.PATHS if p.rpartition(".")[0] == path}
    assert not below or module.__path__ is not None
    parent, _, last = name.rpartition(".")
    assert getattr(importlib.import_module(parent), last) is module
    for own in peft_names.names(path):
        assert getattr(module, own) is not None
        assert own in dir(module)


def test_each_home_of_the_table_is_a_module_and_each_method_has_a_row():
    homes = {*fastpeft.HOMES.values(), *peft_names.HOMES}
    for home in homes:
        importlib.import_module(f"fastpeft.{home}")
    named = {token for row in peft_names._MODULES.values() for token in row.split()}
    assert named <= homes | {*fastpeft.HOMES, *peft_names._HOME, *fastpeft.__all__}
    files = {type(method).__module__.rpartition(".")[2] for method in registry().values()}
    assert {*peft_names.METHODS} == files


def test_what_is_in_no_row_is_in_no_module():
    assert importlib.util.find_spec("fastpeft.tuners.nothing") is None
    assert importlib.util.find_spec("fastpeft.nothing") is None
    with pytest.raises(ImportError):
        importlib.import_module("fastpeft.tuners.nothing")
    for path in ("utils", "tuners", "tuners.lora", "peft_model"):
        module = importlib.import_module(f"fastpeft.{path}")
        with pytest.raises(AttributeError, match=f"'fastpeft.{path}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018
        assert not hasattr(module, "__wrapped__")


def test_attributes_lead_from_package_to_module_as_in_peft():
    code = "import fastpeft as peft; print(peft.tuners.lora.layer.LoraLayer is peft.tuners.lora.LoraLayer, " \
           "peft.peft_model.PeftModel is peft.PeftModel, peft.utils.other.transpose.__module__)"  # fmt: skip
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "True", "fastpeft.compat.peft_only"]


def test_the_table_costs_nothing_until_a_name_is_used():
    code = "import sys, fastpeft, fastpeft.tuners.lora.layer, fastpeft.utils.other; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_names_can_be_patched_pickled_and_starred():
    with mock.patch("fastpeft.utils.other.transpose", return_value=3):
        assert fastpeft.utils.other.transpose() == 3
    assert fastpeft.utils.other.transpose is fastpeft.utils.transpose
    for path, name in (("tuners.lora.config", "LoraConfig"), ("tuners.lora.model", "LoraModel"),
                       ("peft_model", "PeftModelForCausalLM"), ("utils.other", "ModulesToSaveWrapper")):  # fmt: skip
        cls = getattr(importlib.import_module(f"fastpeft.{path}"), name)
        assert pickle.loads(pickle.dumps(cls)) is cls
    scope: dict[str, object] = {}
    exec("from fastpeft.tuners.lora import *", scope)
    assert scope["LoraConfig"] is fastpeft.LoraConfig
    assert {"LoraLayer", "Linear4bit", "LoftQConfig"} <= scope.keys()


def test_a_package_of_ours_can_have_a_path_of_peft_too():
    package = ModuleType("fastpeft.config.base")
    package.__getattr__ = partial(peft_names.find, package.__name__)
    assert package.PeftConfig is fastpeft.PeftConfig
    assert not hasattr(package, "nothing")
