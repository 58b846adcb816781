"""Lookups from which something was made, and which are made again, all at once, to see whether it still holds.

A linear layer finds out at each call which tensors a kernel takes for it: hooks, modes, containers, parameters. In
Python that takes longer than a token's product. Dicts that are looked up in one C loop take a tenth of it, and nobody
who changes a layer has to tell.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_get, _address = dict.get, Tensor.data_ptr


class Lookups:
    """Entries of dicts, hooks that there were none of, and places of tensors. keeps: false once a lookup was none of
    these, so that nothing may be kept."""

    def __init__(self) -> None:
        self.keeps = True
        self._dicts: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._empty: list[Collection[Any]] = []
        self._hooks = RemovableHandle.next_id  # rises with each hook that torch registers, wherever
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []

    def entries(self, held: Any, *keys: Any) -> None:
        """The values of a dict's keys, or that it has none."""
        if not isinstance(held, dict):
            self.keeps = False
            return
        for key in keys:
            self._dicts.append(held)
            self._keys.append(key)
            self._values.append(held.get(key))

    def no_hooks(self, *containers: Collection[Any]) -> None:
        """Containers of hooks that torch registers, which hold none."""
        self._empty.extend(containers)

    def calls_of(self, module: nn.Module) -> None:
        """Nobody acts in a module's calls (`acts_in_calls`)."""
        self.entries(module.__dict__, "forward")
        self.no_hooks(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                      module._backward_pre_hooks)  # fmt: skip

    def memory_of(self, tensor: Tensor) -> None:
        """A tensor is where it is, in memory that others may give it."""
        self._tensors.append(tensor)
        self._addresses.append(tensor.data_ptr())

    def refuse(self) -> None:
        """Something else was looked at."""
        self.keeps = False

    def hold(self) -> bool:
        """True if each of them would find the same now."""
        return (
            all(map(is_, map(_get, self._dicts, self._keys), self._values))
            and (self._hooks == RemovableHandle.next_id or self._unhooked())
            and (not self._tensors or [*map(_address, self._tensors)] == self._addresses)
        )

    def _unhooked(self) -> bool:
        """Look at the hooks, as some were registered since."""
        now = RemovableHandle.next_id
        if any(self._empty):
            return False
        self._hooks = now
        return True
