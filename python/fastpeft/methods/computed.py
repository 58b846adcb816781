"""Tensors that all layers of an adapter share (VeRA's A and B), and tensors that are computed and not trained.

A shared tensor is in one container that every layer of the adapter holds, and the tuner too where there is one, so that
it moves with the model, and stays one, wherever it was injected. Keys are PEFT's: in memory
`base_model.model.<layer>.vera_A.<adapter>` and `base_model.vera_A.<adapter>`, in a file `base_model.vera_A` alone.
FRoD's, one for the layers of a role, are on the tuner alone: `base_model.frod_V.<role>.<adapter>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Computed:
    """A buffer that follows from the configuration and the base model.

    make: gives the tensor, of `shape` and `dtype`, on the CPU. persistent: whether files hold it. One that they do not
    hold is computed even where a file will fill the others, once the file was checked. exact: keep
    `dtype` rather than take the layer's.
    """

    def __init__(
        self,
        shape: Iterable[int],
        make: Callable[[], Tensor],
        persistent: bool = True,
        dtype: torch.dtype = torch.float32,
        exact: bool = False,
    ) -> None:
        self.shape, self.make, self.persistent, self.dtype = tuple(shape), make, persistent, dtype
        self.exact = exact

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


class SharedValues:
    """What `Method.make_shared` gave, by attribute, for `Method.make_state`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None


