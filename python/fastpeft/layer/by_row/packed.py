"""The stack of a layer's adapters, kept while none of them changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_kernels import AdapterStack

from ...methods.math.cache import SAMPLED, Seen
from ..containers import AdapterDict
from .prefetch import Prefetch, of_dicts, of_objects

if TYPE_CHECKING:
    from ..layer import AdapterLayer

_OFTEN = 4  # from so many questions on an answer is worth its preparation, which takes as long as packing


class Packed:
    """The stack of some adapters of a layer in evaluation, for as long as none of them changes."""

    def __init__(self, layer: AdapterLayer, names: Sequence[str], low_rank: Sequence[tuple[Tensor, Tensor, float]]):
        self.slots = {name: i for i, name in enumerate(names)}
        with torch.inference_mode(False), torch.no_grad():
            self.stack = pack(low_rank)
        self._scaling = _Entries(layer.scaling, names)
        # containers have an entry for each adapter; what is in their modules has a dictionary of its own
        held = [h for name in names for c in _containers(layer, name) for h in _entries(c, name)]
        values = [value for _, _, value in held]
        large = {id(c._modules): c._modules for _, c in layer.containers()}
        self._modules = [_Entries(store, own) for store in large.values() if (own := [n for n in names if n in store])]
        small = [h for h in held if id(h[0]) not in large]
        self._stores, self._keys, self._values = [h[0] for h in small], [h[1] for h in small], [h[2] for h in small]
        modules = [m for m in values if isinstance(m, nn.Module) and m._parameters]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._handles = -1  # of hooks anywhere, when these modules had none
        tensors = [t for t in (*values, *self._scaling.values) if isinstance(t, Tensor)]
        self._tensors = tensors
        # What is read of each is a line from memory, at every call.
        samples = max(2, min(SAMPLED, 4 * SAMPLED // max(1, len(tensors))))
        self._seen = None if any(t.is_inference() for t in tensors) else Seen(tensors, samples)
        self._asked = 0
        self._fetch: Callable[[], None] = _nothing

    def serves(self, names: Iterable[str]) -> bool:
        """Whether it has these adapters as they are now."""
        return all(map(self.slots.__contains__, names)) and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the adapters are as they were."""
        seen = self._seen
        if seen is None:
            return False
        self._asked += 1
        if self._asked == _OFTEN:
            self._fetch = Prefetch(self._addresses(seen))
        self._fetch()
        if not self._as_scaled() or self._hooked() or not all(map(_Entries.same, self._modules)):
            return False
        return all(map(operator.is_, map(dict.get, self._stores, self._keys), self._values)) and seen.untouched()

    def _addresses(self, seen: Seen) -> Iterator[int]:
        yield from seen.addresses()
        yield from of_dicts(self._stores)
        for each in (self._scaling, *self._modules):
            yield from of_dicts([each.store])
            yield from of_objects(each.store.values())

    def unwritten(self) -> bool:
        """Whether nothing was written to, at a tenth of the time of `serves`: what was replaced, and writes that leave
        no version, are not noticed."""
        return self._seen is not None and self._as_scaled() and self._seen.unversioned()

    def _as_scaled(self) -> bool:
        """Whether scalings are as they were, and no gradient is wanted."""
        if not self._scaling.same():
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors))

    def _hooked(self) -> bool:
        """Whether a module has a hook; they are looked through when one was registered anywhere since."""
        if self._handles != RemovableHandle.next_id:
            if any(self._hooks):
                return True
            self._handles = RemovableHandle.next_id
        return False


def _nothing() -> None:
    pass


class _Entries:
    """Some entries of a dictionary, as they were when this was made."""

    def __init__(self, store: dict[str, Any], names: Sequence[str]) -> None:
        self.store, self.names, self.values = store, names, [store.get(name) for name in names]
        self._all = [*store], [*store.values()]

    def same(self) -> bool:
        """Whether they are equal to what they were. The whole is compared first, which takes a fifth of the time."""
        store, (names, values) = self.store, self._all
        if [*store.values()] == values and [*store] == names:
            return True
        if [*map(store.get, self.names)] != self.values:
            return False
        self._all = [*store], [*store.values()]
        return True


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
