"""Triton backend of grouped_linear: the host side. The kernel is in `triton_kernels.py`, imported on first use.

The rows are in order of their groups, so the adapters' small products are those of multi_lora_linear as they are. The
product with W has tiles of rows of one group; grids are bounded by what the shapes alone say, so nothing waits for the
device. Its tile is one for every GPU: none was measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from ..lora_linear import triton as single
from ..multi_lora_linear import triton as multi

BN = 64  # columns of a result


class _Groups(multi._Plan):
    """The rows of x by group, which are in order; those of no group come last, as rows without an adapter do there."""

    def __init__(self, offsets: Tensor, m: int, r: int, scaling: float) -> None:
        e, device = offsets.shape[0] - 1, offsets.device
        self.rows, self.count, self.max_rank, self.stacked = m, e, r, e * r
        self.bounds = torch.cat((offsets, offsets.new_full((1,), m))).to(torch.int32)
        self.order = torch.arange(m, dtype=torch.int32, device=device)
        self.scaling = torch.full((e,), scaling, dtype=torch.float32, device=device)
        self.spans = torch.arange(e, device=device) * r, torch.full((e,), r, dtype=torch.int64, device=device)


def _product(
    x: Tensor, w: single._Weight, shape: tuple[int, int], plan: _Groups, low: Tensor | None, b: Tensor | None,
    bias: Tensor | None, by_rows: bool,
) -> Tensor:  # fmt: skip
    """x W^T, or with by_rows x W, + low b^T of each group, + its bias. shape: of one W; b: [E, ., r]."""
    from . import triton_kernels as kernels

    (m, depth), (n, k) = x.shape, shape
    columns, r = k if by_rows else n, 0 if low is None else low.shape[1]
    y = x.new_empty((m, columns))
    if not m:
        return y
    bm, bk = 16 if plan.each() <= 16 else 64, 32 if x.dtype is torch.float32 else 64  # three stages fit in 99 KiB
    strides = w.strides if w.dense else (0, *w.strides)
    b = x[:, :0].unsqueeze(0) if b is None else b
    host.launch(kernels.product_kernel, (plan.tiles(bm), single._cdiv(columns, BN)), x, *w.pointers,
                x if low is None else low, b, x if bias is None else bias, y, plan.bounds, depth, columns, n, k, r,
                plan.count, *strides, *b.stride(), BY_ROWS=by_rows, ADAPTER=r > 0, BIAS=bias is not None,
                **w.constants, PRECISION=single._precision(x.dtype), BM=bm, BN=BN, BK=bk, BR=16, num_warps=4,
                num_stages=3)  # fmt: skip
    return y


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, offsets: Tensor, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [M, N]."""
    x = x.contiguous()
    (m, k), n, e = x.shape, out_features, offsets.shape[0] - 1
    w = single._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                       e * n, k, x.dtype)  # fmt: skip
    plan = _Groups(offsets, m, 0 if a is None else a.shape[1], scaling)
    s = None
    if a is not None and plan.stacked and m:
        arch = tuning.arch_of(x.device)
        s = multi._project(x, a.reshape(plan.stacked, k).contiguous(), plan, single._Dropout(0.0, None, k, x), True,
                           arch)  # fmt: skip
    bias = None if bias is None else bias.contiguous()
    return _product(x, w, (n, k), plan, s, b if s is not None else None, bias, False)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    offsets: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [E, r, K], db [E, N, r]); empty where not needed."""
    dy = dy.contiguous()
    (m, n), k, e = dy.shape, x.shape[1], offsets.shape[0] - 1
    w = single._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                       e * n, k, dy.dtype)  # fmt: skip
    plan = _Groups(offsets, m, 0 if a is None else a.shape[1], scaling)
    none, ds = x.new_empty((0,)), None
    da, db = (none if t is None or not need_ab else t.new_zeros(t.shape) for t in (a, b))
    if a is not None and b is not None and plan.stacked and m:
        arch, flat = tuning.arch_of(x.device), (plan.stacked, -1)
        down, up = a.reshape(flat).contiguous(), b.mT.reshape(flat).contiguous()
        drop = single._Dropout(0.0, None, 4, x)
        if need_ab:
            x = x.contiguous()
            s = multi._project(x, down, plan, single._Dropout(0.0, None, k, x), False, arch)
            sums = up.new_zeros(up.shape)
            ds = multi._outer(dy, s, up, sums, plan, drop, arch)
            assert ds is not None
            db = sums.view(e, -1, n).mT.contiguous()
            multi._outer(x, ds, None, da.view(flat), plan, drop, arch)
        else:
            ds = multi._project(dy, up, plan, drop, True, arch)
    if not need_dx:
        return none, da, db
    return _product(dy, w, (n, k), plan, ds, None if ds is None or a is None else a.mT, None, True), da, db


def _when(x: Tensor, *args: Any) -> str | None:
    offsets = next(t for t in args[7:10] if isinstance(t, Tensor))  # the forward's at 8, the backward's at 9
    if offsets.shape[0] + 1 > host.MOST_BLOCKS:
        return f"does not serve more than {host.MOST_BLOCKS - 2} groups"
    return host.wrong_mode(x)


BACKENDS = host.backends({"grouped_linear": forward, "grouped_linear_backward": backward}, _when)
