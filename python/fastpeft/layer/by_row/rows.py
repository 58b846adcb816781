"""Rows of a batch that differ: an adapter for each (`adapter_names`), and values for each (aLoRA's offsets)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import AdapterStack, PreparedCall, lora_linear_by_row

from ...methods.fused import Fused
from .call import RowNames, RowValues, call_of, names_of, now, values_of
from .mixed import Routed, stacked
from .names import RowHost
from .packed import Packed


class _Last(threading.local):
    """The computation for the last assignment of rows in this thread, which may come again."""

    def __init__(self) -> None:
        self.routed: Routed | None = None
        self.age = -1


class RowState:
    """The part of an `AdapterLayer` that knows what its rows are, and what was made for them.

    A call of the model brings its rows (`call.py`). What is assigned to the layer itself holds for all threads where no
    call says otherwise. idle: whether nothing is assigned to it. packed: the adapters, packed for the kernel. together:
    the call of training, for this layer or for several that begin with it.
    """

    def __init__(self, layer: RowHost) -> None:
        self._layer = layer
        self._names: RowNames | None = None
        self._steady = False
        self.stack: tuple[AdapterStack, Tensor] | None = None
        self.values: RowValues | None = None
        self.idle = True
        self.packed: Packed | None = None
        self._turn = object()  # of the names that are assigned to the layer
        self._last, self._age = _Last(), 0
        self.together = PreparedCall(lora_linear_by_row)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_last", "_turn")}
        return {**kept, **dict.fromkeys(("packed", "stack"))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=_Last(), _turn=object())
        self.idle = self._names is None

    def forget(self) -> None:
        """Drop what was made for the layer as it was."""
        self._age += 1
        self.packed = self._last.routed = None
        self.together = PreparedCall(lora_linear_by_row)

    @property
    def names(self) -> RowNames | None:
        """The adapters of the rows that are computed now."""
        names = names_of(self._layer)
        return self._names if names is None else names

    @property
    def last(self) -> Routed | None:
        """As `_Last`."""
        return self._last.routed

    def given(self) -> bool:
        """True if the rows have adapters or values of their own now."""
        of_call = names_of(self._layer) is not None or bool(values_of(self._layer))
        return of_call or not self.idle or self.values is not None

    def assign(self, names: Sequence[str] | None, steady: bool = False) -> None:
        """`AdapterLayer.set_rows`."""
        if names is not None and self.stack is not None:
            raise ValueError(_OF_A_STACK)
        self._names, self._steady = None if names is None else tuple(names), steady
        self._turn = object()
        self.idle = self._names is None and self.stack is None

    def assign_stack(self, stack: AdapterStack | None, adapters: Tensor | None) -> None:
        """`AdapterLayer.set_row_stack`."""
        if (stack is None) != (adapters is None):
            raise ValueError("set_row_stack needs a stack and the rows' places in it, or None for both.")
        if stack is not None and self.names is not None:
            raise ValueError("The rows of this layer have adapters by name: call set_rows(None) first.")
        self.stack, self.idle = None, self._names is None
        if stack is not None and adapters is not None:
            stacked(self._layer, stack, adapters)  # raises where it cannot
            self.stack, self.idle = (stack, adapters), False

    def plan(self) -> Fused | Routed | None:
        """The computation of the layer for the rows of this call, if they have adapters of their own."""
        by_name = self.by_name()
        if by_name is not None or self.stack is None:
            return by_name
        return None if self._layer._disable_adapters else stacked(self._layer, *self.stack)

    def by_name(self) -> Routed | None:
        """The same where the adapters are the layer's own."""
        if now.state.call is not None:
            call = call_of(self._layer)
            names = None if call is None else call.names[call.layers[self._layer]]
            if call is not None and names is not None:
                if self.stack is not None:
                    raise ValueError(_OF_A_STACK)
                return self._routed(names, call, call.steady)
        return None if self._names is None else self._routed(self._names, self._turn, self._steady)

    def routed(self, rows: RowNames) -> Routed:
        """The computation of the layer for these adapters of its rows."""
        return self._routed(rows, None, False)

    def _routed(self, rows: RowNames, turn: Any, steady: bool) -> Routed:
        if torch.compiler.is_compiling():
            return Routed(self._layer, rows)
        mine = self._last
        last = mine.routed
        if last is None or mine.age != self._age or last.rows != rows:
            last = mine.routed = Routed(self._layer, rows)
            mine.age = self._age
        if last.turn is not turn:
            last.again(turn, steady)
        return last

    def values_of(self, adapter: str) -> Sequence[Any] | None:
        """An adapter's values for the rows that its method sees now."""
        part = now.state.part
        members = None
        if part is not None and part[0] is self._layer:
            if part[1] is None:
                return None
            members = part[1]
        values = (values_of(self._layer) or self.values or {}).get(adapter)
        return values if values is None or members is None else [values[i] for i in members]


_OF_A_STACK = "The rows of this layer have adapters of a stack: call set_row_stack(None, None) first."
