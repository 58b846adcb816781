"""Tensors that all layers of an adapter share (VeRA's A and B), and tensors that are computed and not trained.

A shared tensor is in one container that every layer of the adapter holds, and the tuner too where there is one, so that
it moves with the model, and stays one, wherever it was injected. Keys are PEFT's: in memory
`base_model.model.<layer>.vera_A.<adapter>` and `base_model.vera_A.<adapter>`, in a file `base_model.vera_A` alone.
FRoD's, one for the layers of a role, are on the tuner alone: `base_model.frod_V.<role>.<adapter>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .containers import AdapterDict

if TYPE_CHECKING:
    from .layer import AdapterLayer


class Computed:
    """A buffer that follows from the configuration and the base model.

    make: gives the tensor, of `shape` and `dtype`, on the CPU. persistent: whether files hold it. One that they do not
    hold is computed even where a file will fill the others, once the file was checked. exact: keep
    `dtype` rather than take the layer's.
    """

    def __init__(
        self,
        shape: Iterable[int],
        make: Callable[[], Tensor],
        persistent: bool = True,
        dtype: torch.dtype = torch.float32,
        exact: bool = False,
    ) -> None:
        self.shape, self.make, self.persistent, self.dtype = tuple(shape), make, persistent, dtype
        self.exact = exact

    def tensor(self, empty: bool) -> Tensor:
        """The buffer; on the meta device if `empty`."""
        if empty:
            value = torch.empty(self.shape, dtype=self.dtype, device="meta")
        else:
            with torch.device("cpu"), torch.no_grad():
                value = self.make().contiguous()
        buffer = nn.Buffer(value, persistent=self.persistent)
        buffer.exact = self.exact  # type: ignore[attr-defined]  # for `inject.place`
        return buffer


def compute(state: dict[str, Any], loading: bool = False, later: bool = False) -> None:
    """Replace each `Computed` by its tensor. loading: a file brings those that it holds. later: compute none yet."""
    for name, value in state.items():
        if isinstance(value, Computed) and not (later and not value.persistent):
            state[name] = value.tensor(empty=loading and value.persistent)


class SharedDict(AdapterDict):
    """A container that several layers hold; an adapter's entry goes when the last of its layers lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: dict[str, int] = {}
        self.place = ""  # where on a tuner `state_dict` has it, if only there

    def _is_elsewhere(self, prefix: str) -> bool:
        return bool(self.place) and not f".{prefix}".endswith(f".{self.place}.")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self._is_elsewhere(prefix):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not self._is_elsewhere(prefix):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def hold(self, adapter: str) -> None:
        self._holders[adapter] = self._holders.get(adapter, 0) + 1

    def release(self, adapter: str, default: None = None) -> None:
        """`hold` undone; nothing where this layer's adapter holds nothing."""
        left = self._holders.get(adapter, 0) - 1
        if left > 0:
            self._holders[adapter] = left
            return
        self._holders.pop(adapter, None)
        self.pop(adapter, None)


class SharedValues:
    """What `Method.make_shared` gave, by attribute, for `Method.make_state`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None


def fill_containers(values: Mapping[str, Any], adapter: str, held: Mapping[str, SharedDict]) -> dict[str, SharedDict]:
    """Put an adapter's shared tensors into containers by their names: those of `held` that other adapters use, or new
    ones."""
    found = {}
    for name, value in values.items():
        if not isinstance(value, (Tensor, nn.Module)):
            continue  # told to `make_state` only
        container = held.get(name)
        found[name] = container = SharedDict() if container is None else container
        container.set(adapter, value, persistent=getattr(value, "persistent", True))
    reuse(found, adapter)
    return found


def reuse(containers: Mapping[str, SharedDict], adapter: str) -> None:
    """Give an adapter whose buffer has the very values of another adapter's that one, and its memory back."""
    for container in containers.values():
        value = container._buffers.get(adapter)
        others = {id(t): t for t in container._buffers.values() if t is not None and t is not value}
        for other in others.values() if value is not None else ():
            if _equal(other, value):
                container._buffers[adapter] = other
                break


def _equal(a: Tensor, b: Any) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and not a.is_meta and not b.is_meta
    # The first values tell almost any two apart.
    return alike and torch.equal(a.flatten()[:8], b.flatten()[:8]) and torch.equal(a, b)


def held_containers(layers: Iterable[AdapterLayer]) -> dict[str, SharedDict]:
    """The shared containers of a model's layers, by their names on a tuner."""
    found: dict[str, SharedDict] = {}
    for layer in layers:
        for attribute, name in layer.shared.items():
            container = layer._modules[attribute]
            assert isinstance(container, SharedDict)
            found.setdefault(name, container)
    return found


def register_at(parent: nn.Module, name: str, container: SharedDict) -> None:
    """Make a container reachable from a tuner; a dot in its name is a level (`frod_V.q_proj`)."""
    *path, last = name.split(".")
    container.place = name if path else ""  # PEFT's layers do not have these
    for part in path:
        child = parent._modules.setdefault(part, nn.ModuleDict())
        assert child is not None
        parent = child
    parent._modules[last] = container
