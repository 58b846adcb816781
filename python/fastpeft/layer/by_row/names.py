"""Adapters by row of a batch: groups, checks, and the layer as code by row sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from ...methods.method import AdaptedLayer, AdapterView, Method
from ...weights.base import LayerInfo
from ..containers import AdapterDict


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
