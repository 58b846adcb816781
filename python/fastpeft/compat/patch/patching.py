"""`fastpeft.patch` and `fastpeft.unpatch`."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn

from ...config.types import warn
from ...files.whole import is_sharded
from ...layer.layer import AdapterLayer
from ...recipes.accelerate import Acceleration, accelerate, unaccelerate
from .classes import SIDE, patched, switch, switch_back
from .hooks import Hooks
from .report import Report

OLDEST, NEWEST = (0, 18), (0, 21)  # of PEFT's versions, those that are run by tests
_WRAPPERS = {"OptimizedModule": "compiled", "FullyShardedDataParallel": "wrapped by FSDP"}
_accelerated: WeakSet[nn.Module] = WeakSet()  # models whose layers or loss are quicker by `patch`


def patch(model: nn.Module | None = None, *, layers: bool = False, loss: bool = False) -> Report:
    """Run a model that was adapted by real PEFT on fastpeft's methods and kernels, in place and reversibly.

    Its layers stay instances of PEFT's classes with their parameters, so that everything but the forward is PEFT's:
    saving, loading, merging, adding and deleting adapters. model: any module with layers of PEFT in it (a PeftModel, a
    model with `add_adapter`, a UNet). None: every model that gets an adapter from now on, whoever makes it.

    layers, loss: use quicker decoder layers, and compute the loss by chunks, too, as `fastpeft.accelerate` does.

    Returns a report, which prints as a table; without a model, of all that is patched by now. Raises ValueError for a
    model without PEFT's adapters, or one that is compiled or sharded, and ImportError without a PEFT that this version
    knows, and for layers or loss where nothing of both can be had. An error leaves the model as it was.
    """
    check_version()
    if model is None:
        _asked.update(layers=layers, loss=loss)
        _hooks.install()
        return Report(list(patched))
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch needs a model, a torch.nn.Module, got {type(model).__name__}")
    check_model(model)
    found = list(tuner_layers(model))
    if not found:
        own = any(isinstance(m, AdapterLayer) for m in model.modules())
        why = "is fastpeft's own, which needs no patch" if own else "has no layer with an adapter of PEFT"
        raise ValueError(f"patch: this {type(model).__name__} {why}. Call patch after the adapters were added.")
    more: Acceleration | None = None
    if layers or loss:
        more = accelerate(model, layers, loss)
        _accelerated.add(model)
    _switch(found)
    switched = [layer for _, layer, _ in found if SIDE in layer.__dict__]
    return Report(switched, [layer for _, layer, _ in found if SIDE not in layer.__dict__], more)


def unpatch(model: nn.Module | None = None) -> None:
    """Give PEFT's layers their own forward back, exactly as it was. None: those of every model, and end `patch()`."""
    if model is None:
        _hooks.remove()
    for layer in list(patched if model is None else model.modules()):
        if layer in patched:
            switch_back(layer)
    inside = set() if model is None else set(model.modules())  # `patch()` does it to the model below a PeftModel
    for owner in list(_accelerated):
        if model is None or owner in inside:
            _accelerated.discard(owner)
            unaccelerate(owner)


def check_version() -> None:
    """Raise ImportError unless PEFT is installed in a version that is known."""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("patch is for models of PEFT, which is not installed: pip install peft") from None
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= numbers <= NEWEST:
        known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise ImportError(f"patch knows PEFT {known}, and {version} is installed: its layers may compute otherwise")


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that is compiled or sharded."""
    for name, module in model.named_modules():
        state = _WRAPPERS.get(type(module).__name__)
        if state is None and module._compiled_call_impl is not None:
            state = "compiled"
        if state is None and any(is_sharded(p) for p in module.parameters(recurse=False)):
            state = "sharded by FSDP"
        if state is not None:
            raise ValueError(f"patch: {name or 'the model'} is {state} already. Call patch before that.")


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """(name, layer, configurations) of each layer of PEFT in a model. Configurations are those of the tuner, or of the
    model, that is nearest above it."""
    module = sys.modules.get("peft.tuners.tuners_utils")
    if module is None:
        return
    configs: dict[str, Any] = {"": {}}
    for name, part in model.named_modules():
        above = configs[name.rpartition(".")[0]]
        own = part.__dict__.get("peft_config", getattr(part, "peft_config", None) if name == "" else None)
        configs[name] = own if isinstance(own, dict) and own else above
        if issubclass(type(part), module.BaseTunerLayer):  # of our layers `isinstance` says so, too
            yield name, part, configs[name]


def _switch(found: list[tuple[str, nn.Module, dict[str, Any]]]) -> None:
    for name, layer, configs in found:
        if SIDE not in layer.__dict__ and type(layer).__module__.partition(".")[0] == "peft":
            switch(layer, name, configs)


def _follow(tuner: Any) -> None:
    _switch([(name, layer, tuner.peft_config) for name, layer, _ in tuner_layers(tuner.model)])
    if any(_asked.values()) and tuner.model not in _accelerated:
        try:
            accelerate(tuner.model, **_asked)
        except ValueError as error:
            warn(f"patch: {type(tuner.model).__name__} keeps its layers and its loss: {error}", 3)
            return
        _accelerated.add(tuner.model)


_asked = {"layers": False, "loss": False}  # of models that are made after `patch()`
_hooks = Hooks(_follow)
