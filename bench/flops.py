"""Deterministic costs of a layer: FLOPs by torch's counter and by what our ops declare, bytes kept for the backward.

Counted: products (as torch.utils.flop_counter does) and FFTs (5 n log2 n). Elementwise work and gathers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from fastpeft.apps.estimate.flops import register
from torch import Tensor, nn


def flops_of(call: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    register()
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@contextmanager
def saved_bytes(layer: nn.Module, x: Tensor) -> Iterator[list[int]]:
    """Inside, what autograd keeps; afterwards the list holds the bytes of it that are neither x nor the layer's own."""
    own = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        for part in (t._indices(), t._values()) if t.layout is torch.sparse_coo else (t,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return t

    result: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield result
    result.append(sum(kept.values()))
