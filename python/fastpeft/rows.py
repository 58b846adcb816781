"""Rows of a batch that differ: an adapter for each (`adapter_names`), and values for each (aLoRA's offsets)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .method import Method
from .weights import BaseWeight

RowValues = Mapping[str, Sequence[Any]]


class Recall:
    """The row values of a model's last forwards: gradient checkpointing runs layers again in the backward pass, when
    the forward's values are gone."""

    def __init__(self) -> None:
        self._kept: tuple[RowValues, ...] = ()  # two that differ tell as much as more of them
        self._used = False

    def keep(self, values: RowValues) -> None:
        before = () if self._used else self._kept
        self._kept, self._used = (*(v for v in before if v != values), values)[-2:], False

    def values(self) -> RowValues | None:
        if not self._kept or torch._C._current_graph_task_id() == -1:  # not within a backward pass
            return None
        self._used = True
        if len(self._kept) > 1:
            raise ValueError(
                "Gradient checkpointing runs a layer again in the backward pass, and after several forwards it is not "
                "known for which batch: call backward() after each forward."
            )
        return self._kept[0]


class Rows:
    """The part of `AdapterLayer` that knows what a batch's rows are, for the duration of one forward of the model."""

    kind: type[BaseWeight]
    layer_name: str
    methods: dict[str, Method]
    merged_adapters: list[str]
    _disable_adapters: bool
    _plan: Any
    _rows: list[str] | None = None
    _row_values: RowValues | None = None
    _recall: Recall | None = None
    _members: list[int] | None = None  # the rows that are computed now, where these are not all

    def _compose(self, x: Tensor, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def set_rows(self, adapter_names: list[str] | None) -> None:
        """Assign an adapter to each row of the next batches ("__base__" for none); None ends that."""
        self._rows = adapter_names
        self._plan = None

    def set_row_values(self, values: RowValues | None, recall: Recall | None = None) -> None:
        """What `Method.row_values` gave for each row of the next batches, by adapter; None ends that.

        recall: where to find them once more in a backward pass.
        """
        self._row_values, self._recall = values, recall or self._recall

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

    def _mixed(self, x: Tensor, rows: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Each row through its own adapter. Every method works: rows of one adapter are one ordinary call."""
        if len(x) != len(rows):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(rows)} and {len(x)} respectively."
            )
        if self.kind.transient and len(set(rows)) > 1:
            raise ValueError(
                f"{self.layer_name or 'The layer'} ({self.kind.label}) runs with one merged weight, so that its rows "
                "cannot have adapters of their own (`adapter_names`)."
            )
        if self.merged_adapters:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters: call `unmerge_adapter`.")
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(rows):
            # An adapter that this layer does not have leaves it as it is, like "__base__".
            groups.setdefault(name if name in self.methods and not self._disable_adapters else "__base__", []).append(i)
        if len(groups) == 1:
            return self._compose(x, [n for n in groups if n != "__base__"], args, kwargs)
        order = [i for members in groups.values() for i in members]
        parts = []
        try:
            for name, members in groups.items():
                self._members = members
                parts.append(self._compose(x[members], [] if name == "__base__" else [name], args, kwargs))
        finally:
            self._members = None
        back = torch.empty(len(order), dtype=torch.long)
        back[order] = torch.arange(len(order))
        return torch.cat(parts)[back.to(parts[0].device)]
