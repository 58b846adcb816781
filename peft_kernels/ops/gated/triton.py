"""Triton backend of gated: the host side. Bound by memory: three reads or writes forward, five backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...strides import row_stride
from ...triton_lib import host
from . import new_gradients

BLOCK = 2048  # elements a program, of one row


def _laid(t: Tensor) -> tuple[Tensor, int, int]:
    """(a tensor as the kernels take it, the distances of its rows and of its elements)."""
    step = t.stride(-1) if t.dim() and t.shape[-1] > 1 else 1
    row = row_stride(t, step)
    return (t, row, step) if row is not None else (t.contiguous(), t.shape[-1], 1)


def _launch(kernel: Any, laid: list[tuple[Tensor, int, int]], n: int, rows: int, *args: Any, **options: Any) -> None:
    if all(row == n and step == 1 for _, row, step in laid):  # one long row: fewer ends
        n, rows = n * rows, 1
    blocks = -(-n // BLOCK)
    strides = [number for _, row, step in laid for number in (row, step)]
    block = min(BLOCK, max(128, 1 << (n - 1).bit_length())) if n else BLOCK
    host.launch(kernel, (rows * blocks,), *(t for t, _, _ in laid), *args, n, blocks, *strides, BLOCK=block,
                num_warps=4, num_stages=1, **options)  # fmt: skip


def _shape(t: Tensor) -> tuple[int, int]:
    n = t.shape[-1] if t.dim() else 1
    return n, t.numel() // n if n else 0


def forward(gate: Tensor, up: Tensor | None, act: int, alpha: float, limit: float, shift: float) -> Tensor:
    """act(gate) * up."""
    from .triton_kernels import forward_kernel

    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch(forward_kernel, [_laid(gate), _laid(gate if up is None else up)], *_shape(gate), h, alpha, limit, shift,
            ACT=act, HAS_UP=up is not None, HAS_LIMIT=limit > 0.0)  # fmt: skip
    return h


def backward(
    gate: Tensor, up: Tensor | None, dh: Tensor, act: int, alpha: float, limit: float, shift: float, fused: int
) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    from .triton_kernels import backward_kernel

    first, second, dgate, dup = new_gradients(gate, up, fused)
    laid = [_laid(t) for t in (gate, gate if up is None else up, dgate, dgate if dup is None else dup)]
    _launch(backward_kernel, laid, *_shape(gate), dh.contiguous(), alpha, limit, shift, ACT=act, HAS_UP=up is not None,
            HAS_LIMIT=limit > 0.0)  # fmt: skip
    return first, second


BACKENDS = host.backends({"gated": forward, "gated_backward": backward})
