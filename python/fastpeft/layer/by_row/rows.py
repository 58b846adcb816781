"""Rows of a batch that differ: an adapter for each (`adapter_names`), and values for each (aLoRA's offsets)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_kernels import AdapterStack, PreparedCall, lora_linear_by_row

from ...methods.fused import Fused
from .mixed import Routed, stacked
from .names import Recall, RowHost, RowValues
from .packed import Packed


class RowState:
    """The part of an `AdapterLayer` that knows what the rows of the next batches are, and what was made for them.

    idle: whether no rows were ever assigned that still count. members: the rows that are computed now, where these are
    not all. steady: nothing is written to until rows are assigned again. packed: the adapters, packed for the kernel.
    together: the call of training, for this layer or for several that begin with it.
    """

    def __init__(self, layer: RowHost) -> None:
        self._layer = layer
        self.names: tuple[str, ...] | None = None
        self.stack: tuple[AdapterStack, Tensor] | None = None
        self.values: RowValues | None = None
        self.recall: Recall | None = None
        self.steady, self.idle = False, True
        self.members: list[int] | None = None
        self.packed: Packed | None = None
        self.last: Routed | None = None  # of the last assignment of rows, which may come again
        self.together = PreparedCall(lora_linear_by_row)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(("packed", "last", "stack"))}

    def forget(self) -> None:
        """Drop what was made for the layer as it was."""
        self.packed = self.last = None
        self.together = PreparedCall(lora_linear_by_row)

    def assign(self, names: Sequence[str] | None, recall: Recall | None = None, steady: bool = False) -> None:
        """`AdapterLayer.set_rows`."""
        if names is not None and self.stack is not None:
            raise ValueError("The rows of this layer have adapters of a stack: call set_row_stack(None, None) first.")
        self.names, self.steady = None if names is None else tuple(names), steady
        self.recall = self.recall if recall is None else recall
        self.idle = self.names is None and self.stack is None and self.recall is None
        if self.last is not None:
            self.last.again()

    def assign_stack(self, stack: AdapterStack | None, adapters: Tensor | None) -> None:
        """`AdapterLayer.set_row_stack`."""
        if (stack is None) != (adapters is None):
            raise ValueError("set_row_stack needs a stack and the rows' places in it, or None for both.")
        if stack is not None and self.names is not None:
            raise ValueError("The rows of this layer have adapters by name: call set_rows(None) first.")
        self.stack, self.idle = None, self.names is None and self.recall is None
        if stack is not None and adapters is not None:
            stacked(self._layer, stack, adapters)  # raises where it cannot
            self.stack, self.idle = (stack, adapters), False

    def plan(self) -> Fused | Routed | None:
        """The computation of the layer for the rows of this forward, if it was told of any."""
        if self.idle:
            return None
        if self.stack is None:
            rows = self.names if self.names is not None or self.recall is None else self.recall.rows()
            return None if rows is None else self.routed(rows)
        return None if self._layer._disable_adapters else stacked(self._layer, *self.stack)

    def routed(self, rows: tuple[str, ...]) -> Routed:
        """The computation of the layer for these adapters of its rows."""
        if torch.compiler.is_compiling():
            return Routed(self._layer, rows)
        if self.last is None or self.last.rows != rows:
            self.last = Routed(self._layer, rows)
        return self.last

    def values_of(self, adapter: str) -> Sequence[Any] | None:
        """An adapter's values for the rows that its method sees now."""
        everyone = self.values
        if everyone is None and self.recall is not None:
            everyone = self.recall.values()
        values = (everyone or {}).get(adapter)
        return values if values is None or self.members is None else [values[i] for i in self.members]

    @contextmanager
    def only(self, members: list[int]) -> Iterator[None]:
        """Within this, methods see these rows alone."""
        self.members = members
        try:
            yield
        finally:
            self.members = None

    @contextmanager
    def without_values(self) -> Iterator[None]:
        """Within this, methods see an input that is not of the batch."""
        values, self.values = self.values, {}
        try:
            yield
        finally:
            self.values = values
