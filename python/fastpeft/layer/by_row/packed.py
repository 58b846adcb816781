"""The stack of a layer's adapters, kept while none of them changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_kernels import AdapterStack, Fingerprint

from ...methods.fused import LowRank
from ..containers import AdapterDict
from .names import RowHost

_SAMPLES = 32  # elements of a layer's adapters that are compared: each is a line from memory, at every look


class Packed:
    """The stack of some adapters of a layer in evaluation, for as long as none of them changes.

    slots: the place of each in the stack. A look at a hundred tensors takes as long as a small layer's product, so
    that it is one pass over lists, in C, and is made once for each assignment of rows.
    """

    def __init__(self, layer: RowHost, low_rank: Mapping[str, LowRank]) -> None:
        self.slots = {name: i for i, name in enumerate(low_rank)}
        with torch.inference_mode(False), torch.no_grad():
            self.stack = pack([*low_rank.values()])
        self._layer, self._version = layer, layer.version
        # which entries the containers have is among the layer's version; what their modules hold is looked up
        entries = [entry for _, c in layer.containers() for name in self.slots for entry in _entries(c, name)]
        self._stores, self._keys, self._values = ([entry[i] for entry in entries] for i in range(3))
        modules = [m for _, c in layer.containers() for name in self.slots for m in _modules(c.get(name))]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._handles = -1  # of hooks anywhere, when these modules had none
        scales = [layer._scaling[name] for name in self.slots if name in layer._scaling]
        tensors = [t for t in (*self._values, *scales) if isinstance(t, Tensor)]
        self._trained = tensors
        least = 1 if all(t.element_size() >= 4 for t in tensors) else 2  # two short numbers may well be the same
        self._seen = Fingerprint(tensors, max(least, _SAMPLES // max(1, len(tensors))))
        # a tied module reads another layer's container
        self._known = self._seen.known and not any(hasattr(m, "matrix") and not m._parameters for m in modules)

    def serves(self, names: Iterable[str]) -> bool:
        """True if it has these adapters as they are now."""
        return all(map(self.slots.__contains__, names)) and self.unchanged()

    def unchanged(self) -> bool:
        """True if the adapters are as they were."""
        if not self._known or self._layer.version != self._version or self._wanted() or self._hooked():
            return False
        there = map(dict.get, self._stores, self._keys)  # type: ignore[arg-type]  # of its overloads mypy takes one
        return all(map(is_, there, self._values)) and self._seen.unchanged()

    def same_versions(self) -> bool:
        """`unchanged` at a fraction of its time: of modules' parameters that were replaced, and of writes that leave no
        version, nothing is noticed."""
        if not self._known or self._layer.version != self._version or self._wanted():
            return False
        return self._seen.same_versions()

    def _wanted(self) -> bool:
        """True if gradients of the adapters are wanted."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._trained)

    def _hooked(self) -> bool:
        """True if a module has a hook; they are looked through when one was registered anywhere since."""
        if self._handles != RemovableHandle.next_id:
            if any(self._hooks):
                return True
            self._handles = RemovableHandle.next_id
        return False


def pack(low_rank: Sequence[LowRank]) -> AdapterStack:
    """`AdapterStack.pack` of adapters whose dtypes may differ; a float64 layer keeps scalings of its precision."""
    if any(each.a.dtype is torch.float64 for each in low_rank):
        return AdapterStack.pack([(each.a, each.b * each.scaling, 1.0) for each in low_rank])
    return AdapterStack.pack([(each.a, each.b, each.scaling) for each in low_rank])


def _entries(container: AdapterDict, adapter: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(dictionary, key, what is there) of every tensor, and of every module in a module, of an adapter's entry."""
    held: list[tuple[nn.Module, set[str] | None]] = [(m, None) for m in _modules(container.get(adapter))]
    for module, names in ((container, {adapter}), *held):
        stores: list[dict[str, Any]] = [module._parameters, module._buffers]
        for store in stores if module is container else [*stores, module._modules]:
            for name, value in store.items():
                if value is not None and (names is None or name in names):
                    yield store, name, value


def _modules(value: Any) -> Iterable[nn.Module]:
    return value.modules() if isinstance(value, nn.Module) else ()
