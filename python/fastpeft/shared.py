"""Tensors that all layers of an adapter share (VeRA's A and B), and tensors that are computed and not trained.

A shared tensor is in one container that every layer of the adapter holds, and the tuner too where there is one, so that
it moves with the model, and stays one, wherever it was injected. Keys are PEFT's: in memory
`base_model.model.<layer>.vera_A.<adapter>` and `base_model.vera_A.<adapter>`, in a file `base_model.vera_A` alone.
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
    hold is computed even where a file will fill the others; none is computed while a file is only checked.
    """

    def __init__(
        self,
        shape: Iterable[int],
        make: Callable[[], Tensor],
        persistent: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape, self.make, self.persistent, self.dtype = tuple(shape), make, persistent, dtype

    def tensor(self, empty: bool) -> Tensor:
        """The buffer; on the meta device if `empty`."""
        if empty:
            value = torch.empty(self.shape, dtype=self.dtype, device="meta")
        else:
            with torch.device("cpu"), torch.no_grad():
                value = self.make().contiguous()
        return nn.Buffer(value, persistent=self.persistent)


def compute(state: dict[str, Any], loading: bool = False, checking: bool = False) -> None:
    """Replace each `Computed` by its tensor. loading: a file brings those that it holds. checking: compute none."""
    for name, value in state.items():
        if isinstance(value, Computed):
            state[name] = value.tensor(empty=checking or (loading and value.persistent))


class SharedDict(AdapterDict):
    """A container that several layers hold; an adapter's entry goes when the last of its layers lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: dict[str, int] = {}

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
        for other in container._buffers.values() if value is not None else ():
            if other is not None and other is not value and _equal(other, value):
                container._buffers[adapter] = other
                break


def _equal(a: Tensor, b: Any) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and not a.is_meta and torch.equal(a, b)


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
    for part in path:
        child = parent._modules.setdefault(part, nn.ModuleDict())
        assert child is not None
        parent = child
    parent._modules[last] = container
