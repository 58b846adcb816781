"""Containers of tensors that all layers of an adapter share (VeRA's A and B)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.method import AdaptedLayer
from .containers import AdapterDict

IN_MODEL = "shared_adapters"  # what an injected model, which has no tuner, calls the place of these containers


class SharedDict(AdapterDict):
    """A container that several layers hold; an adapter's entry goes when the last of its layers lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: dict[str, int] = {}
        self.place = ""  # where on a tuner or a model `state_dict` has it, if only there

    def _is_elsewhere(self, prefix: str) -> bool:
        return bool(self.place) and not f".{prefix}".endswith(f".{self.place}.")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not self._is_elsewhere(prefix):
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        for key, tensor in super().state_dict(prefix=prefix).items():  # torch goes on to its modules, which ask for it
            state_dict.setdefault(key, tensor)

    def state_dict(self, *args: Any, prefix: str = "", destination: Any = None, **options: Any) -> Any:
        """As of any module, and empty where it is said elsewhere."""
        if destination is not None and self._is_elsewhere(prefix):
            return destination
        return super().state_dict(*args, prefix=prefix, destination=destination, **options)

    def hold(self, adapter: str) -> None:
        self._holders[adapter] = self._holders.get(adapter, 0) + 1

    def release(self, adapter: str, default: None = None) -> None:
        """`hold` undone; nothing where this layer's adapter holds nothing."""
        left = self._holders.pop(adapter, 0) - 1
        if left > 0:
            self._holders[adapter] = left
        else:
            self.pop(adapter, None)


def fill_containers(values: Mapping[str, Any], adapter: str, held: Mapping[str, SharedDict]) -> dict[str, SharedDict]:
    """Put an adapter's shared tensors into containers by their names: those of `held` that others use, or new ones."""
    found = {}
    for name, value in values.items():
        if isinstance(value, (Tensor, nn.Module)):  # others are for `make_state` only
            found[name] = held[name] if name in held else SharedDict()
            found[name][adapter] = value
    reuse(found, adapter)
    return found


def reuse(containers: Mapping[str, SharedDict], adapter: str) -> None:
    """Give an adapter whose buffer has the very values of another adapter's that one, and its memory back."""
    for container in containers.values():
        value = container._buffers.get(adapter)
        others = {id(t): t for t in container._buffers.values() if t is not None and t is not value}
        if value is not None:
            container._buffers[adapter] = next((t for t in others.values() if _equal(t, value)), value)


def _equal(a: Tensor, b: Any) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and not a.is_meta and not b.is_meta
    # The first values tell almost any two apart.
    return alike and torch.equal(a.flatten()[:8], b.flatten()[:8]) and torch.equal(a, b)


def held_containers(layers: Iterable[AdaptedLayer]) -> dict[str, SharedDict]:
    """The shared containers of a model's layers, by their names on a tuner."""
    found: dict[str, SharedDict] = {}
    for layer in layers:
        for attribute, name in layer.shared.items():
            found.setdefault(name, layer._modules[attribute])
    return found


def register_at(parent: nn.Module, name: str, container: SharedDict) -> None:
    """Make a container reachable from a tuner or a model; a dot in its name is a level (`frod_V.q_proj`)."""
    *path, last = name.split(".")
    container.place = name if path else ""  # PEFT's layers do not have these
    for part in path:
        child = parent._modules.setdefault(part, nn.ModuleDict())
        assert child is not None
        parent = child
    parent._modules[last] = container
