"""The stack of a layer's adapters, kept while none of them changes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_kernels import AdapterStack

from .containers import AdapterDict
from .kept import SAMPLED, Seen

if TYPE_CHECKING:
    from .layer import AdapterLayer


class Packed:
    """The stack of some adapters of a layer in evaluation, for as long as none of them changes."""

    def __init__(self, layer: AdapterLayer, names: Sequence[str], low_rank: Sequence[tuple[Tensor, Tensor, float]]):
        self.slots = {name: i for i, name in enumerate(names)}
        with torch.inference_mode(False), torch.no_grad():
            self.stack = pack(low_rank)
        self._scaling: Mapping[str, Any] = layer.scaling
        self._scales = [self._scaling[name] for name in names]
        held = [h for name in names for c in _containers(layer, name) for h in _entries(c, name)]
        self._stores, self._keys, self._values = zip(*held, strict=True)
        modules = [m for m in self._values if isinstance(m, nn.Module) and m._parameters]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._handles = -1  # of hooks anywhere, when these modules had none
        tensors = [t for t in self._values if isinstance(t, Tensor)]
        self._tensors = tensors + [s for s in self._scales if isinstance(s, Tensor)]
        # What is read of each is a line from memory, at every call.
        samples = max(2, min(SAMPLED, 4 * SAMPLED // max(1, len(self._tensors))))
        self._seen = None if any(t.is_inference() for t in self._tensors) else Seen(self._tensors, samples)

    def serves(self, names: Iterable[str]) -> bool:
        """Whether it has these adapters as they are now."""
        seen = self._seen
        if seen is None or not all(map(self.slots.__contains__, names)) or not self._as_scaled() or self._hooked():
            return False
        return all(map(operator.is_, map(dict.get, self._stores, self._keys), self._values)) and seen.untouched()

    def unwritten(self) -> bool:
        """Whether nothing was written to, at a tenth of the time of `serves`: what was replaced, and writes that leave
        no version, are not noticed."""
        return self._seen is not None and self._as_scaled() and self._seen.unversioned()

    def _as_scaled(self) -> bool:
        """Whether scalings are as they were, and no gradient is wanted."""
        if [*map(self._scaling.get, self.slots)] != self._scales:
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors))

    def _hooked(self) -> bool:
        """Whether a module has a hook; they are looked through when one was registered anywhere since."""
        if self._handles != RemovableHandle.next_id:
            if any(self._hooks):
                return True
            self._handles = RemovableHandle.next_id
        return False


def pack(low_rank: Sequence[tuple[Tensor, Tensor, float]]) -> AdapterStack:
    """`AdapterStack.pack` of adapters whose dtypes may differ; a float64 layer keeps scalings of its precision."""
    if any(a.dtype is torch.float64 for a, _, _ in low_rank):
        low_rank = [(a, b * scale, 1.0) for a, b, scale in low_rank]
    return AdapterStack.pack(low_rank)


def _containers(layer: AdapterLayer, adapter: str) -> Iterator[AdapterDict]:
    return (container for _, container in layer.containers() if adapter in container)


def _entries(container: AdapterDict, adapter: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(dictionary, key, what is there) of every module and tensor that an adapter has in a container."""
    for module, names in ((container, [adapter]), *((m, None) for m in _modules(container.get(adapter)))):
        for store in (module._modules, module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and (names is None or name in names):
                    yield store, name, value


def _modules(value: Any) -> Iterable[nn.Module]:
    return value.modules() if isinstance(value, nn.Module) else ()
