"""Rows of a batch that differ: an adapter for each (`adapter_names`), and values for each (aLoRA's offsets)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_kernels import AdapterStack

from .mixed import Routed, stacked
from .packed import Packed

RowValues = Mapping[str, Sequence[Any]]


class Recall:
    """What the rows of a model's last forwards were: gradient checkpointing runs layers again in the backward pass,
    when the forward's values are gone."""

    def __init__(self) -> None:
        # two that differ tell as much as more of them
        self._kept: tuple[tuple[tuple[str, ...] | None, RowValues], ...] = ()
        self._used = False

    def __bool__(self) -> bool:
        return bool(self._kept)

    def keep(self, rows: tuple[str, ...] | None, values: RowValues) -> None:
        """Called for each forward that a backward pass may follow."""
        before, new = () if self._used else self._kept, (rows, values)
        self._kept, self._used = (*(kept for kept in before if kept != new), new)[-2:], False

    def _last(self) -> tuple[tuple[str, ...] | None, RowValues | None]:
        if not self._kept or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return None, None  # not within a backward pass
        self._used = True
        if len(self._kept) > 1:
            raise ValueError(
                "Gradient checkpointing runs a layer again in the backward pass, and after several forwards it is not "
                "known for which batch: call backward() after each forward."
            )
        return self._kept[0]

    def rows(self) -> tuple[str, ...] | None:
        return self._last()[0]

    def values(self) -> RowValues | None:
        return self._last()[1]


class Rows:
    """The part of `AdapterLayer` that knows what a batch's rows are, for the duration of one forward of the model."""

    _plan: Any
    _disable_adapters: bool
    _rows: tuple[str, ...] | None = None
    _row_stack: tuple[AdapterStack, Tensor] | None = None
    _row_values: RowValues | None = None
    _recall: Recall | None = None
    _steady = False  # nothing is written to until rows are assigned again
    _members: list[int] | None = None  # the rows that are computed now, where these are not all
    _routed: Routed | None = None  # of the last assignment of rows, which may come again
    _packed: Packed | None = None

    def changed(self) -> None:
        """What was made for this layer is made anew: its adapters, its base or its mode are others now."""
        self._plan = self._routed = self._packed = None

    def set_rows(self, adapter_names: Sequence[str] | None, recall: Recall | None = None, steady: bool = False) -> None:
        """Assign an adapter to each row of the next batches ("__base__" for none); None ends that.

        recall: where to find it, and the rows' values, once more in a backward pass. steady: nothing is written to
        before rows are assigned again, so that only the first batch looks whether something was.
        """
        if adapter_names is not None and self._row_stack is not None:
            raise ValueError("The rows of this layer have adapters of a stack: call set_row_stack(None, None) first.")
        rows = None if adapter_names is None else tuple(adapter_names)
        recall = self._recall if recall is None else recall
        # nn.Module takes its time to set attributes
        self.__dict__.update(_rows=rows, _recall=recall, _steady=steady, _plan=None)
        if self._routed is not None:
            self._routed.again()

    def set_row_stack(self, stack: AdapterStack | None, adapters: Tensor | None) -> None:
        """Compute the next batches with adapters of `stack`, none of which is this layer's own; None ends that.

        adapters: int64, the place in the stack for each of x.shape[0] rows, or for each token of x flattened to
        [tokens, in_features]; -1 is the base alone. Both may be written to between forwards, in place (a CUDA graph
        sees the new values). The layer needs no adapter of its own; it must be linear, dense or in 4 bits, frozen, and
        without merged adapters: else ValueError.
        """
        if (stack is None) != (adapters is None):
            raise ValueError("set_row_stack needs a stack and the rows' places in it, or None for both.")
        if stack is not None and self._rows is not None:
            raise ValueError("The rows of this layer have adapters by name: call set_rows(None) first.")
        self._row_stack, self._plan = None, None
        if stack is not None and adapters is not None:
            stacked(self, stack, adapters)  # type: ignore[arg-type]  # raises where it cannot
            self._row_stack = stack, adapters

    def _row_plan(self) -> Any:
        """What computes the layer for the rows of this forward, if it was told of any."""
        if self._row_stack is None:
            rows = self._rows if self._rows is not None or self._recall is None else self._recall.rows()
            return None if rows is None else self.routed(rows)
        if self._disable_adapters:
            return None
        return stacked(self, *self._row_stack)  # type: ignore[arg-type]

    def routed(self, rows: tuple[str, ...]) -> Routed:
        """What computes the layer for these adapters of its rows."""
        if torch.compiler.is_compiling():
            return Routed(self, rows)  # type: ignore[arg-type]
        if self._routed is None or self._routed.rows != rows:
            self._routed = Routed(self, rows)  # type: ignore[arg-type]
        return self._routed

    def set_row_values(self, values: RowValues | None) -> None:
        """What `Method.row_values` gave for each row of the next batches, by adapter; None ends that."""
        self.__dict__["_row_values"] = values

    def row_values(self, adapter: str) -> Sequence[Any] | None:
        """An adapter's values for the rows that its method sees now."""
        everyone = self._row_values
        if everyone is None and self._recall is not None:
            everyone = self._recall.values()
        values = (everyone or {}).get(adapter)
        return values if values is None or self._members is None else [values[i] for i in self._members]

    @contextmanager
    def without_row_values(self) -> Iterator[None]:
        """Within this, methods see an input that is not of the batch."""
        values, self._row_values = self._row_values, {}
        try:
            yield
        finally:
            self._row_values = values
