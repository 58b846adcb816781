"""FLOPs of operators: torch's own formulas, those that our ops declare, and FFTs (5 n log2 n).

Counted are products and FFTs, as torch.utils.flop_counter does. Elementwise work and gathers are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _fft(x: Any, dims: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    shape = x if not isinstance(x, Tensor) else x.shape
    shape = out_shape if out_shape is not None and math.prod(out_shape) > math.prod(shape) else shape
    length = math.prod(shape[d] for d in dims)
    return int(5 * math.prod(shape) * math.log2(max(2, length)))


def _sparse(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    entries = a._nnz() if a.layout is not torch.strided else b._nnz()
    return 2 * entries * (b.shape[-1] if a.layout is not torch.strided else a.shape[0])


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
    # What torch's own table lacks: products in place, and those with a sparse matrix, in which its entries count.
    register_flop_formula(torch.ops.aten.addmm_)(lambda c, a, b, **_: 2 * math.prod(a) * b[-1])
    register_flop_formula(torch.ops.aten.baddbmm_)(lambda c, a, b, **_: 2 * math.prod(a) * b[-1])
    register_flop_formula([torch.ops.aten._sparse_mm, torch.ops.aten._sparse_sparse_matmul], get_raw=True)(_sparse)
    register_flop_formula(torch.ops.aten.sparse_sampled_addmm, get_raw=True)(
        lambda s, a, b, *_, **__: 2 * s.values().numel() * a.shape[-1]
    )
    real = register_flop_formula([torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2c, torch.ops.aten._fft_c2r])
    real(_fft)


def counters() -> dict[Any, Callable[..., int]]:
    """The formula of each operator that has one: ``(*args, out_val=..., **kwargs) -> FLOPs``."""
    from torch.utils.flop_counter import flop_registry

    register()
    return flop_registry
