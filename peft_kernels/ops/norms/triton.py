"""Triton backend of rms_norm and layer_norm: the host side. Bound by memory: two passes forward, three backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...strides import with_heads
from ...triton_lib import host
from . import new_gradients

MOST = 16384  # features: a row lies in the registers of a program
TILE = 1024  # elements of a program that takes several short rows
MOST_PARTS, COLUMNS, ROWS = 64, 128, 32  # of the sums over rows: their number, and the tile of a program


def _options(n: int) -> dict[str, int]:
    block = 1 << (n - 1).bit_length()
    return {"BLOCK": block, "R": max(1, TILE // block), "num_warps": min(16, max(1, block // 1024)), "num_stages": 1}


def _grid(rows: int, options: dict[str, int]) -> tuple[int, ...]:
    return (-(-rows // options["R"]),)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool) -> Tensor:
    from .triton_kernels import norm_kernel

    y, n, options = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1], _options(x.shape[-1])
    rows, (x, strides) = x.numel() // n, with_heads(x)
    w, b = (x if t is None else t.contiguous() for t in (weight, bias))
    host.launch(norm_kernel, _grid(rows, options), x, w, b, y, rows, n, *strides, eps, offset,
                HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, CENTRED=centred, **options)  # fmt: skip
    return y


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, need_dx: bool, need_sums: bool,
    centred: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from .triton_kernels import norm_backward_kernel, sums_kernel

    (dx, *found), n, options = new_gradients(x, need_dx, need_sums, centred), x.shape[-1], _options(x.shape[-1])
    rows, dy, (x, strides) = x.numel() // n, dy.contiguous(), with_heads(x)
    w = x if weight is None else weight.contiguous()
    # the mean of each row and 1 / its root, for the sums over rows
    stats = x.new_empty((rows, 2) if need_sums else (0,), dtype=torch.float32)
    host.launch(norm_backward_kernel, _grid(rows, options), dy, x, w, dx, stats, rows, n, *strides, eps, offset,
                HAS_WEIGHT=weight is not None, NEED_DX=need_dx, NEED_STATS=need_sums, CENTRED=centred,
                **options)  # fmt: skip
    if need_sums:
        parts = min(MOST_PARTS, max(1, -(-rows // ROWS)))
        sums = x.new_zeros((parts, 2, n), dtype=torch.float32)
        host.launch(sums_kernel, (-(-n // COLUMNS), parts), dy, x, stats, sums, rows, n, *strides, parts,
                    R=ROWS, BLOCK=COLUMNS, num_warps=4, num_stages=1)  # fmt: skip
        found = [*sums.sum(0).unbind(0)][: len(found)]
    return dx, *found


def _refusal(x: Tensor, *args: Any) -> str | None:
    return f"rows of more than {MOST} features" if x.shape[-1] > MOST else host.wrong_mode(x)


BACKENDS = host.backends({
    "rms_norm": lambda x, weight, eps, offset: _norm(x, weight, None, eps, offset, False),
    "rms_norm_backward": lambda *args: _gradients(*args, False),
    "layer_norm": lambda x, weight, bias, eps: _norm(x, weight, bias, eps, 0.0, True),
    "layer_norm_backward": lambda dy, x, weight, eps, *need: _gradients(dy, x, weight, eps, 0.0, *need, True),
}, _refusal)  # fmt: skip
