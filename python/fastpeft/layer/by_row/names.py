"""Adapters by row of a batch: groups, checks, recall in a backward pass, and the layer as code by row sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...methods.method import AdaptedLayer, AdapterView, Method
from ...weights.base import LayerInfo
from ..containers import AdapterDict

RowValues = Mapping[str, Sequence[Any]]


class RowHost(AdaptedLayer, Protocol):
    """A layer whose rows may differ, and the members that by-row code uses."""

    layer_name: str
    methods: dict[str, Method]
    merged_adapters: list[str]
    cast_input_dtype_enabled: bool
    _disable_adapters: bool
    rows: Any  # `rows.RowState`, which itself knows the layer by this protocol

    @property
    def _scaling(self) -> dict[str, Any]: ...

    @property
    def info(self) -> LayerInfo: ...

    def view(self, adapter: str) -> AdapterView: ...

    def containers(self) -> Iterator[tuple[str, AdapterDict]]: ...

    def _compose(self, x: Tensor, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor: ...


def grouped(rows: Iterable[str]) -> dict[str, list[int]]:
    """The rows of each adapter."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(rows):
        groups.setdefault(name, []).append(i)
    return groups


def check_length(x: Tensor | Sequence[Any], rows: Sequence[str]) -> None:
    if len(x) != len(rows):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(rows)} and {len(x)} respectively."
        )


class Recall:
    """Rows of a model's last forwards: gradient checkpointing runs layers again in the backward pass, when the
    forward's values are gone."""

    def __init__(self) -> None:
        # two at most: a second, different one already makes the backward ambiguous
        self._kept: tuple[tuple[tuple[str, ...] | None, RowValues], ...] = ()
        self._used = False

    def __bool__(self) -> bool:
        return bool(self._kept)

    def keep(self, rows: tuple[str, ...] | None, values: RowValues) -> None:
        """Called for each forward that a backward pass may follow."""
        before, new = () if self._used else self._kept, (rows, values)
        self._kept, self._used = (*(kept for kept in before if kept != new), new)[-2:], False

    def _last(self) -> tuple[tuple[str, ...] | None, RowValues | None]:
        # a layer cannot tell otherwise that it runs within a backward pass, and outside of one a recall means nothing
        if not self._kept or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return None, None
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
