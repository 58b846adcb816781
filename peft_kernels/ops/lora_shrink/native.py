"""The native CPU backend: both halves are sums of multi_lora_linear's kernels, with a weight of no features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...dispatch import Backend
from ..lora_linear.native import available, refusal
from ..multi_lora_linear.native import forward
from . import check_rows, part_steps


def _product(x: Tensor, a: Tensor, adapters: Tensor) -> Tensor:
    """x[m] A_j^T, float32 [M, r]; a: [S, r, K]."""
    slots, r, k = a.shape
    if 0 in a.shape:
        return x.new_zeros((x.shape[0], r), dtype=torch.float32)
    starts = torch.arange(slots) * r
    return forward(
        x, x.new_empty((0, k)), None, None, None, None, 0, 64, 256, 0, a.reshape(-1, k), a.new_empty((slots * r, 0)),
        adapters, starts, torch.full_like(starts, r), torch.ones(slots), r, None, 0.0, None,
    )[1]  # fmt: skip


def shrink(
    x: Tensor, a: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor, scale: float, parts: int
) -> Tensor:
    """[slices, parts, M, r]."""
    check_rows("lora_shrink", adapters, a[0].shape[0])
    step = part_steps(x.shape[1], parts)
    out = torch.stack([
        torch.stack([_product(x[:, at : at + step], t[:, :, at : at + step], adapters)
                     for at in range(0, parts * step, step)])
        for t in a
    ]) if parts > 1 else torch.stack([_product(x, t, adapters)[None] for t in a])  # fmt: skip
    if scale != 1.0:
        out.mul_(scale)
        if not math.isfinite(scale):  # zero times that
            out.masked_fill_((adapters < 0)[:, None], 0.0)
    return out


def expand(
    y: Tensor, low: Sequence[Tensor], b: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor,
    offsets: Sequence[int], add: bool,
) -> None:  # fmt: skip
    """y in place."""
    check_rows("lora_expand", adapters, b[0].shape[0])
    for s, t, offset in zip(low, b, offsets, strict=True):
        columns = y[:, offset : offset + t.shape[1]]
        part = _product(s[0] if s.shape[0] == 1 else s.float().sum(0), t, adapters)[:, : columns.shape[1]]
        if add:
            columns.add_(part)
        else:
            columns.copy_(torch.where((adapters >= 0)[:, None], part, columns))


_CPU = frozenset({"cpu"})
BACKENDS = {
    "lora_shrink": Backend("native", shrink, _CPU, available=available,
                           when=lambda x, a, *_: refusal(x, 0, a[0], None, None)),
    "lora_expand": Backend("native", expand, _CPU, available=available,
                           when=lambda y, low, b, *_: refusal(low[0], 0, b[0], None, None)),
}  # fmt: skip
