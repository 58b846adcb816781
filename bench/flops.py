"""Deterministic costs of a layer: FLOPs by torch's counter and by what our ops declare, bytes kept for the backward.

Counted: products (as torch.utils.flop_counter does) and FFTs (5 n log2 n). Elementwise work and gathers are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def _fft(x: Any, dims: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    shape = x if not isinstance(x, Tensor) else x.shape
    shape = out_shape if out_shape is not None and math.prod(out_shape) > math.prod(shape) else shape
    length = math.prod(shape[d] for d in dims)
    return int(5 * math.prod(shape) * math.log2(max(2, length)))


@cache
def register() -> None:
    """Tell torch's counter of our ops and of the FFTs, once."""
    from torch.utils.flop_counter import register_flop_formula

    from peft_kernels import dispatch

    for op in dispatch.ops().values():
        if op.flops is not None:
            packet = getattr(torch.ops.peft_kernels, op.name)
            formula = op.flops
            register_flop_formula(packet, get_raw=True)(
                lambda *args, formula=formula, out_val=None, **kwargs: formula(*args)
            )
    real = register_flop_formula([torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2c, torch.ops.aten._fft_c2r])
    real(_fft)


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
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    result: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield result
    result.append(sum(kept.values()))
