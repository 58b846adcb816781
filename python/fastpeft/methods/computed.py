"""Tensors of an adapter that are computed and not trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Computed:
    """A buffer that follows from the configuration and the base model.

    make: gives the tensor, of `shape` and `dtype`, on the CPU. persistent: whether files hold it; one that they do not
    hold is computed even where a file fills the others, once the file was checked. exact: keep `dtype` rather than
    take the layer's.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    persistent: bool = True
    dtype: torch.dtype = torch.float32
    exact: bool = False

    def tensor(self, empty: bool) -> Tensor:
        """The buffer; on the meta device if `empty`."""
        if empty:
            value = torch.empty(self.shape, dtype=self.dtype, device="meta")
        else:
            with torch.device("cpu"), torch.no_grad():
                value = self.make().contiguous()
        buffer = nn.Buffer(value, persistent=self.persistent)
        buffer.exact = self.exact  # type: ignore[attr-defined]  # for `inject.place`
        return buffer


def compute(state: dict[str, Any], loading: bool = False, later: bool = False) -> None:
    """Replace each `Computed` by its tensor. loading: a file brings those that it holds. later: compute none yet."""
    for name, value in state.items():
        if isinstance(value, Computed) and not (later and not value.persistent):
            state[name] = value.tensor(empty=loading and value.persistent)
