"""Rows of a batch in order of their adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import arg_error


class RowGroups:
    """Which adapter each row has, and the rows in order of their adapters, for the launches of a batch.

    adapters: int64 [rows], of `slots` adapters; -1, and what is no slot, is no adapter. It is kept, not copied: after
    it was changed, `refresh` puts the rows in order anew, in the same tensors, for CUDA graphs that were recorded with
    them. A call's x may have fewer rows: those beyond must have no adapter.
    """

    def __init__(self, adapters: Tensor, slots: int) -> None:
        if adapters.dim() != 1 or adapters.dtype is not torch.int64:
            raise arg_error("RowGroups", "adapters", "int64 [rows]", (adapters.dtype, tuple(adapters.shape)))
        self.adapters, self.slots = adapters, slots
        self.order = torch.empty(adapters.shape, dtype=torch.int32, device=adapters.device)
        self.bounds = torch.empty((slots + 2,), dtype=torch.int32, device=adapters.device)
        self._each = torch.arange(slots + 2, device=adapters.device)
        self.refresh()

    def refresh(self) -> None:
        """Put the rows in order. Nothing waits for the device."""
        none = (self.adapters < 0) | (self.adapters >= self.slots)
        sorted_, order = self.adapters.masked_fill(none, self.slots).sort(stable=True)
        self.order.copy_(order)
        self.bounds.copy_(torch.searchsorted(sorted_, self._each))

    def rows(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """(adapters [m], order, bounds) of the first m rows."""
        if m > self.adapters.shape[0]:
            raise arg_error("RowGroups", "rows", f"at most {self.adapters.shape[0]}", m)
        return self.adapters[:m], self.order, self.bounds
