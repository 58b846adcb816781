"""Subclasses of PEFT's layer classes whose forward is ours where it can be, and what such a layer has beside PEFT's."""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .companion import Companion, adapters_of
from .stays import Stays

SIDE = "_fastpeft_side"  # the attribute of a patched layer
patched: WeakSet[nn.Module] = WeakSet()  # every layer that is, copies included
_classes: dict[type, type] = {}


class Side:
    """A patched layer's companion, made when it is first needed, and counts of its calls.

    configs: the tuner's configurations by adapter, PEFT's own dictionary. served: calls that were ours. calls: of
    PEFT's forward, by reason. A copy of the layer, or its pickle, has a side of its own with the same configurations.
    """

    def __init__(self, name: str, configs: dict[str, Any]) -> None:
        self.name, self.configs = name, configs
        self.companion: Companion | None = None
        self.served = 0
        self.calls: Counter[str] = Counter()
        self._refused: tuple[Any, Stays] | None = None
        self.settled: tuple[Any, Any, str] | None = None  # active adapters, base layer: then it is PEFT's, and why

    def look(self, layer: Any) -> Companion:
        """The companion of the layer as it is now. Raises Stays where there can be none."""
        found = self.companion
        if found is not None and found.current():
            return found
        self.companion = self.settled = None
        variants, own = dict(getattr(layer, "lora_variant", {})), "forward" in vars(layer.base_layer)
        state = list(layer.active_adapters), layer.base_layer, own, adapters_of(layer), variants
        if self._refused is None or self._refused[0] != state:
            try:
                self.companion = made = Companion(layer, self.name, self.configs)
            except Stays as reason:
                self._refused = state, reason
            else:
                self._refused = None
                return made
        if not own:
            self.settled = layer._active_adapter, layer.base_layer, str(self._refused[1])
        raise self._refused[1]

    def call(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The layer's output; None where PEFT's forward has to give it."""
        try:
            y = self._output(layer, args, kwargs)
        except Stays as reason:
            self.calls[str(reason)] += 1
            return None
        self.served += 1
        return y

    def _output(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not args:
            raise Stays("a call that names its input")
        found = self.look(layer)
        given = {name: value for name, value in kwargs.items() if value is not None}
        if kwargs and hasattr(layer, "_check_forward_args"):
            layer._check_forward_args(*args, **kwargs)
        offsets, names = given.pop("alora_offsets", None), given.get("adapter_names")
        if layer.merged and (layer.disable_adapters or names):
            raise Stays("merged adapters in a call that is without them")
        if layer.disable_adapters or layer.merged:
            given.pop("adapter_names", None)
            return found.base.call(*args, **given)
        if found.several and not names:
            raise Stays("several active adapters that are not all plain LoRAs")
        for when, active in (("training", layer.training), ("gradients", torch.is_grad_enabled())):
            if active and when in found.limits:
                raise Stays(found.limits[when])
        return found.call(args[0], args[1:], given, offsets)


def fast_class(original: type) -> type:
    """The subclass of a layer class whose forward is ours where it can be. Its names are the original's."""
    found = _classes.get(original)
    if found is None:
        members = {
            "forward": _forward, "fastpeft_layer": _layer_of, "_fastpeft_class": original, "__reduce_ex__": _reduce,
            "__doc__": original.__doc__, "__module__": original.__module__, "__qualname__": original.__qualname__,
        }  # fmt: skip
        found = _classes[original] = type(original.__name__, (original,), members)
    return found


def switch(layer: nn.Module, name: str, configs: dict[str, Any]) -> None:
    """Make a layer of PEFT a patched one, in place."""
    layer.__dict__[SIDE] = Side(name, configs)
    layer.__class__ = fast_class(type(layer))
    patched.add(layer)


def switch_back(layer: Any) -> None:
    """Make a patched layer PEFT's own again, exactly as it was."""
    layer.__class__ = type(layer)._fastpeft_class
    layer.__dict__.pop(SIDE, None)
    patched.discard(layer)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):  # a graph sees PEFT's own code
        side: Side = self.__dict__[SIDE]
        found = side.companion
        if (
            found is not None and not kwargs and len(args) == 1 and found.plain and not self._disable_adapters
            and not self.merged_adapters and found.current()
        ):  # fmt: skip
            side.served += 1
            return Companion.forward(found, args[0])
        settled = side.settled  # setting adapters makes a new list
        if settled and self._active_adapter is settled[0] and self._modules["base_layer"] is settled[1]:
            side.calls[settled[2]] += 1
        elif (y := side.call(self, args, kwargs)) is not None:
            return y
    return type(self)._fastpeft_class.forward(self, *args, **kwargs)


def _layer_of(self: Any) -> Companion | None:
    """The companion that computes a plain call of the layer as it is now, for recipes that make it with others."""
    side: Side = self.__dict__[SIDE]
    if self._disable_adapters or self.merged_adapters or "forward" in self.__dict__:
        return None
    try:
        found = side.look(self)
    except Stays:
        return None
    side.served += found.plain
    return found if found.plain else None


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    original = type(self)._fastpeft_class
    _, _, state, *others = original.__reduce_ex__(self, max(int(protocol), 2))
    side: Side = self.__dict__[SIDE]
    return _copy_of, (original,), {**state, SIDE: Side(side.name, side.configs)}, *others


def _copy_of(original: type) -> Any:
    """An empty patched layer, for a copy or a pickle to fill."""
    made: Any = fast_class(original)
    layer: nn.Module = made.__new__(made)
    patched.add(layer)
    return layer
