"""Placing new tensors where their layer computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layer.containers import AdapterDict
from ..methods.method import LayerInfo, State

LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def place(state: State, info: LayerInfo, autocast: bool) -> None:
    """Move new tensors to their layer's device and dtype, as PEFT does; float32 for half precision if asked."""
    for name, value in state.items():
        if not isinstance(value, (nn.Module, Tensor)):
            continue
        holder = AdapterDict({"x": value})
        on_meta = info.device.type == "meta" or any(t.is_meta for t in (*holder.parameters(), *holder.buffers()))
        exact = getattr(value, "exact", False)  # a `Computed` that says so
        dtype = info.dtype if info.dtype.is_floating_point and not exact else None
        holder.to_entry("x", None if on_meta else info.device, dtype)
        if autocast and dtype in LOW_PRECISION:
            holder.to_entry("x", None, torch.float32)
        keeps = getattr(value, "persistent", True)
        state[name] = holder["x"] if keeps else nn.Buffer(holder["x"], persistent=False)
