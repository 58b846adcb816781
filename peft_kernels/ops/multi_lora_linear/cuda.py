"""The CUDA backend of multi_lora_linear: lora_linear's kernels, in which every row of x finds its own adapter.

Rows are grouped where the kernels run (csrc/cuda/row_groups.cuh), so nothing here depends on the values of the indices:
no plan, no sort, no synchronisation. What does not exist acts as the base alone. Limits as lora_linear's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...cuda_rt import backend
from ...formats import contiguous
from ..lora_linear.cuda import BACKWARD_ROWS, DTYPES, ROWS, queue, refuse_rows, refuse_weight, seed_beside
from ..lora_linear.native import pack


def _when_forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> str | None:  # fmt: skip
    return refuse_rows(ROWS, x) or refuse_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type,
                                                 blocksize, nested_blocksize, x.shape[1], a, b, bias)  # fmt: skip


def _when_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    dropout_p: float, seed: Tensor | None, need_dx: bool, need_ab: bool,
) -> str | None:  # fmt: skip
    return refuse_rows(BACKWARD_ROWS, dy) or refuse_weight(
        weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, x.shape[1], a, b,
        None,
    )


def _forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], s [M, max_rank])."""
    y = x.new_empty((x.shape[0], out_features))
    s = x.new_empty((x.shape[0], max_rank), dtype=torch.float32)
    if x.shape[0]:
        x, a, b, weight = (t.contiguous() for t in (x, a, b, weight))
        absmax, nested_absmax, nested_code, offset, bias = contiguous(absmax, nested_absmax, nested_code, offset, bias)
        seed = seed_beside(seed, x)  # lives, as all of these, until everything is queued
        plan = (*(t.contiguous() for t in (adapters, starts, ranks, scaling)), max_rank)
        packed = pack(0, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                      out_features, a, b, 1.0, bias, dropout_p, seed, y=y, s=s, plan=plan)  # fmt: skip
        queue(native.cuda().pk_cuda_lora_linear, packed, quant_type, False, x, weight)
    return y, s


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    dropout_p: float, seed: Tensor | None, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [P, K], db [P, N]); empty where not needed, zero in rows that no row of x uses."""
    dx = x.new_empty(x.shape if need_dx else (0,))
    da, db = a.new_zeros(a.shape if need_ab else (0,)), b.new_zeros(b.shape if need_ab else (0,))
    if x.shape[0]:
        dy, x, a, b, s, weight = (t.contiguous() for t in (dy, x, a, b, s, weight))
        absmax, nested_absmax, nested_code, offset = contiguous(absmax, nested_absmax, nested_code, offset)
        seed = seed_beside(seed, x)
        plan = (*(t.contiguous() for t in (adapters, starts, ranks, scaling)), max_rank)
        packed = pack(0, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                      dy.shape[1], a, b, 1.0, None, dropout_p, seed, s=s, dy=dy, dx=dx if need_dx else None,
                      da=da if need_ab else None, db=db if need_ab else None, plan=plan)  # fmt: skip
        queue(native.cuda().pk_cuda_lora_linear_backward, packed, quant_type, True, dy, weight)
    return dx, da, db


BACKENDS = {
    "multi_lora_linear": backend(_forward, dtypes=DTYPES, when=_when_forward),
    "multi_lora_linear_backward": backend(_backward, dtypes=DTYPES, when=_when_backward),
}
