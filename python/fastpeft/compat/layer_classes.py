"""Classes of adapter layers by PEFT's names. There is one class of adapter layer here, so `LoraLayer`, `IA3Layer` and
the like, and `Linear`, `Embedding` and the like, answer `isinstance` by what a layer holds and sits on."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..config.types import PeftType
from ..layer.custom import CustomLayer
from ..layer.layer import AdapterLayer
from ..methods.method import Method
from ..methods.registry import registry
from ..model.tuner import tuner_class
from .peft_names import FOREIGN

_ATTENTIONS = ("AdaptedAttention", "AdaptedAttentionGPT")  # of layers that have not the name of their method
_LABELS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "ParamWrapper", "Linear4bit",
           "Linear8bitLt")  # fmt: skip
_ENDS = ("ParallelLinear", *_LABELS)  # of names of classes
_ADALORA = {"SVDQuantLinear": FOREIGN["gptq"]}  # one, over GPTQ's weights
_LINEAR = (FOREIGN["torchao"], FOREIGN["inc"])  # which are PEFT's `lora.Linear` as well


class _HeldBy(type):
    """The type of classes whose instances are the adapter layers with an adapter of `method` (on a layer `label`)."""

    method: Method
    label: str | None

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        """A class that derives from one of these is one of layers: it derives from CustomLayer."""
        if not any(isinstance(base, _HeldBy) for base in bases):
            return super().__new__(cls, name, bases, namespace)
        own = dict.fromkeys(CustomLayer if isinstance(base, _HeldBy) else base for base in bases)
        kept = tuple(base for base in own if base is CustomLayer or not issubclass(CustomLayer, base))
        make: Any = type(CustomLayer)
        return make(name, kept, namespace)

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, AdapterLayer):
            return False
        label = instance.base.label
        if cls.label not in (None, label) and not (cls.label == "Linear" and label in _LINEAR):
            return False
        return any(m.peft_type == cls.method.peft_type for m in instance.methods.values())


@functools.cache
def layer_class(method: Method, name: str) -> type:
    """`isinstance(module, LoraLayer)`: true of an adapter layer with an adapter of that method."""
    own_label = name if name in FOREIGN.values() else _ADALORA.get(name)
    label = own_label or next((label for label in (*_ATTENTIONS, *_ENDS) if name.endswith(label)), None)
    own = {"method": method, "label": label, "update_layer": AdapterLayer.update_layer, "__doc__": layer_class.__doc__}
    made: type = _HeldBy(name, (), own)
    return made


def _is_layer(method: Method, name: str) -> bool:
    """True if PEFT has a class of layers `name` for a method: `Linear`, `Linear4bit`, `HRALinear`, `LoraLayer`."""
    if name in _ATTENTIONS:
        return method.peft_type == PeftType.ADAPTION_PROMPT
    if name in FOREIGN.values():
        return method.peft_type == PeftType.LORA
    if name in _ADALORA:
        return method.peft_type == PeftType.ADALORA
    whose = next((name.removesuffix(end) for end in (*_ENDS, "Layer") if name.endswith(end)), None)
    own = {method.model_name.removesuffix("Model").lower(), "svd" if method.model_name == "AdaLoraModel" else ""}
    return whose is not None and (whose.lower() in own or name in _LABELS)


def _method(tuner: str) -> Method:
    return next(m for m in registry().values() if type(m).__module__.rpartition(".")[2] == tuner)


def names(tuner: str) -> list[str]:
    """The names of `peft.tuners.<tuner>`: the method's configuration, its model and its layers."""
    method = _method(tuner)
    layer = method.model_name.removesuffix("Model") + "Layer"
    own = [name for name in (*_ATTENTIONS, *_LABELS, *FOREIGN.values(), *_ADALORA) if _is_layer(method, name)]
    return [method.config_class.__name__, method.model_name, layer, *own]


def attribute(tuner: str, name: str) -> Any:
    """A name of `peft.tuners.<tuner>`, or None if it is not the method's own."""
    method = _method(tuner)
    if name == method.model_name:
        return tuner_class(method)
    home = type(method).__module__
    own = getattr(importlib.import_module(home), name, None)
    defined = isinstance(own, type) and own.__module__ == home
    return layer_class(method, name) if not defined and _is_layer(method, name) else own


def any_layer(name: str) -> type | None:
    """`LoraLayer` and the like, whatever the method."""
    return next((layer_class(m, name) for m in registry().values() if _is_layer(m, name)), None)
