"""`peft.tuners`: the names that scripts import from there, from where they live here.

`fastpeft.tuners.<method>` exists for every method file, and in it `config`, `layer` and `model`. There is one class of
adapter layer, so `LoraLayer`, `IA3Layer` and the like, and `Linear`, `Embedding` and the like, answer `isinstance` by
what a layer holds and sits on.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

from .. import methods as _methods
from ..aliases import register
from ..layer import AdapterLayer
from ..method import Method, registry
from ..tuner import BaseTuner, tuner_class

_LABELS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "ParamWrapper", "Linear4bit",
           "Linear8bitLt")  # fmt: skip
_FUNCTIONS = frozenset({"convert_to_lora", "get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga",
                        "save_as_lora"})  # fmt: skip


class _HeldBy(type):
    """The type of classes whose instances are the adapter layers with an adapter of `method` (on a layer `label`)."""

    method: Method
    label: str | None

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, AdapterLayer) or (cls.label is not None and instance.base.label != cls.label):
            return False
        return any(m.peft_type == cls.method.peft_type for m in instance.methods.values())


def layer_class(method: Method, name: str) -> type:
    """`isinstance(module, LoraLayer)`: whether a module is an adapter layer with an adapter of that method."""
    label = next((label for label in _LABELS if name.endswith(label)), None)
    return _HeldBy(name, (), {"method": method, "label": label, "__doc__": layer_class.__doc__})


def attribute(module: ModuleType, name: str) -> Any:
    """What `peft.tuners.<method>.<name>` is here; kept in the module."""
    if name.startswith("__"):
        raise AttributeError(name)
    part = sys.modules.get(f"{module.__name__}.{name}")
    if part is not None:
        return part
    method_name = module.__name__.removeprefix(f"{__name__}.").partition(".")[0]
    home = importlib.import_module(f"{_methods.__name__}.{method_name}")
    method = next(m for m in registry().values() if type(m).__module__ == home.__name__)
    if name == method.model_name:
        value: Any = tuner_class(method)
    elif _is_layer(method, name):
        value = layer_class(method, name)
    else:
        others = (sys.modules[__name__.rpartition(".")[0]], importlib.import_module("fastpeft.utils.constants"))
        value = next((v for m in (home, *others) if (v := getattr(m, name, None)) is not None), None)
    if value is None:
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    setattr(module, name, value)
    return value


def _is_layer(method: Method, name: str) -> bool:
    """Whether PEFT has a class of layers `name` for a method: `Linear`, `Linear4bit`, `HRALinear`, `LoraLayer`."""
    whose = next((name.removesuffix(end) for end in (*_LABELS, "Layer") if name.endswith(end)), None)
    own = {method.model_name.removesuffix("Model").lower(), "svd" if method.model_name == "AdaLoraModel" else ""}
    return whose is not None and (whose.lower() in own or name in _LABELS)


class _Tuner(ModuleType):
    """`peft.tuners.<method>`, where nothing more is needed than its names."""

    def __getattr__(self, name: str) -> Any:
        return attribute(self, name)


_NAMES = [m.name for m in pkgutil.iter_modules(_methods.__path__) if not m.ispkg]
for _name in {*_NAMES} - {m.name for m in pkgutil.iter_modules(__path__)}:
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _Tuner(f"{__name__}.{_name}", _Tuner.__doc__)
for _part in (f"{__name__}.{_name}.{_part}" for _name in _NAMES for _part in ("bnb", "config", "layer", "model")):
    sys.modules[_part] = _Tuner(_part, _Tuner.__doc__)  # PEFT's files of a method


def __getattr__(name: str) -> Any:
    if name == "lora":
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(sys.modules[__name__.rpartition(".")[0]], name)
    if name.endswith(("Config", "Model", "Layer")):
        for module in (importlib.import_module(f"{__name__}.{n}") for n in _NAMES):
            try:
                return getattr(module, name)
            except AttributeError:
                continue
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


MixedModel = BaseTuner  # every tuner takes adapters of several methods
register(__name__, {"mixed": "tuners"})
register(f"{__name__}.mixed", {"model": "tuners"})

__all__ = ["BaseTuner", "MixedModel", "layer_class"]
