"""Triton backend of lora_shrink and lora_expand: the host side. A launch each for up to `_MOST` slices of a layer.

The rows come in order (`RowGroups`), once for all layers, so nothing is prepared here. Few rows are few tiles: then the
sum over K is left in parts, which the other half adds in order where it reads them (parts * BM * r * 4 bytes of the L2
cache beside BN * r * 2 of B), and no third launch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from ..lora_linear import triton as single
from ..multi_lora_linear.triton import most_tiles, rows_each
from . import part_steps

_MOST = 4  # slices in a launch: each is code of its own in the kernels
_FEW_ROWS = 32  # of an adapter: up to so many, tiles are of 16 rows, as a product on the tensor cores has at least
_BN = 64


def shrink(
    x: Tensor, a: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor, scale: float, parts: int
) -> Tensor:
    """[slices, parts, M, r]."""
    from . import triton_kernels as kernels

    x = x.contiguous()
    (m, k), (slots, r) = x.shape, a[0].shape[:2]
    out = torch.empty((len(a), parts, m, r), dtype=torch.float32, device=x.device)
    if 0 in (k, slots) or not out.numel():
        return out.zero_()
    shape = tuning.Shape(rows_each(m, slots), r, k, r, x.element_size() * 8, plain=k % 16 == 0)
    c = tuning.choose("project", tuning.arch_of(x.device), shape)
    br = single._rank_tile(r, c.BR)
    tiles, at = single._cdiv(r, br), iter(range(len(a)))
    while some := list(islice(at, _MOST)):
        host.launch(
            kernels.shrink_kernel, (most_tiles(m, slots, c.BM), len(some) * tiles, parts), x,
            tuple(a[i].contiguous() for i in some), out[some[0]], order, bounds, m, k, r, slots,
            part_steps(k, parts) // c.BK, float(scale), tiles, COUNT=len(some), BM=c.BM, BK=c.BK, BR=br,
            **single._options(c),
        )  # fmt: skip
    return out


def expand(
    y: Tensor, low: Sequence[Tensor], b: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor,
    offsets: Sequence[int], add: bool,
) -> None:  # fmt: skip
    """y in place."""
    from . import triton_kernels as kernels

    m, (slots, _, r) = y.shape[0], b[0].shape
    if 0 in (m, slots):
        return
    s, b = [t.contiguous() for t in low], [t.contiguous() for t in b]
    wide = max(y.element_size(), b[0].element_size()) == 4  # more registers for each sum
    bm, br = (16 if wide or rows_each(m, slots) <= _FEW_ROWS else 64), single._rank_tile(r, 32)
    widths = [min(t.shape[1], y.shape[1] - offset) for t, offset in zip(b, offsets, strict=True)]
    at = iter(i for i, width in enumerate(widths) if width)
    while some := list(islice(at, _MOST)):
        columns = sum(single._cdiv(widths[i], _BN) for i in some)
        lists = [[t[i] for i in some] for t in (s, b, [t.shape[1] for t in b], widths, offsets)]
        ss, bs, *numbers = map(tuple, lists)
        host.launch(
            kernels.expand_kernel, (most_tiles(m, slots, bm), columns), y, ss, bs, order, bounds, *numbers, m, r, slots,
            y.stride(0), s[0].stride(0), s[0].shape[0], COUNT=len(some), ADD=add, BM=bm, BN=_BN, BR=br, num_warps=4,
            num_stages=2,
        )  # fmt: skip


def _when_expand(y: Tensor, *args: Any) -> str | None:
    return host.wrong_mode(y) if y.stride(1) == 1 or y.shape[1] < 2 else "takes a y whose rows are contiguous"


BACKENDS = host.backends({"lora_shrink": shrink}) | host.backends({"lora_expand": expand}, _when_expand)
