"""Triton backend of multi_lora_linear: the host side. The kernels are in `triton_kernels.py`, imported on first use.

The rows of x are grouped by adapter on the device; every grid is bounded by what the shapes alone say, so nothing waits
for the device, and a call can be recorded in a CUDA graph and replayed with other adapters. The products with W are
those of lora_linear, and so is what is done with many rows of 16-bit x (`lora_linear/triton.py`).

How s B_i is added to a tile of y (and ds A_i to one of dx), in a tile of BM rows and BN features:
- By row, each row reading its B_i: 3 instructions (widen, multiply, add) for each of BM * r * BN terms. NF4 takes 7 for
  each of the K * BN weights of the tile, so at r = 16 and K = 4096 that is 3% at 16 rows, 6% at 32 and 11% at 64. Every
  row's B_i is asked for, from the L1 or L2 cache where rows share it, BM * r / (K / 4) as many bytes (16 bit) as of W:
  a quarter at 16 rows, once at 64. All of it depends on nothing but where the adapters begin.
- By group, a product on the tensor cores for the adapters of the tile, 16 ranks at a time, with zeros in the rows of s
  that are not their own: an adapter's weights are read once per tile. One adapter in the tile, as in a prompt, is what
  lora_linear does. But a step waits for the memory that it reads before the next one asks, and 64 adapters in 64 rows
  are 64 steps.
So by row in the tiles of a decoding step, up to 32 rows; at 64 each tile of y by the groups that it finds; above, where
many rows make long groups, by group, and so for dx and with float32 adapters, both of training: beside a dropout mask
or 32-bit loads the two forms together have too few registers. The parts of a sum over K share the ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from ..lora_linear import panels
from ..lora_linear import triton as single

_MOST_COUNTED = 8192  # rows that the plan's kernel puts in order by counting; more are sorted
_FEW_ROWS = 32  # a tile of no more adds its terms by row
_MOST_ROWS, _MOST_RANK = 64, 64  # and one of no more rows, at no larger rank, where it has more than
_FEW_STEPS = 4  # steps by group, of
_RANKS = 16  # ranks each: what a product on the tensor cores has at least


def most_tiles(rows: int, adapters: int, size: int) -> int:
    """An upper bound of `size`-row tiles of single groups; see `group_tile`."""
    return rows // size + min(adapters + 1, rows)


def rows_each(rows: int, adapters: int) -> int:
    """Rows of an adapter, where as many as can be are in use and all have as many."""
    return single._cdiv(rows, min(adapters, rows))


class _Plan:
    """Which adapter each row of x has, and the rows in order of it; the pointers that the kernels take."""

    def __init__(
        self, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int, a: Tensor
    ) -> None:
        from . import triton_kernels as kernels

        self.rows, self.count, self.max_rank = adapters.shape[0], starts.shape[0], max_rank
        self.stacked = a.shape[0]  # rows of a and b
        self.adapters, self.scaling = adapters.contiguous(), scaling.contiguous()
        self.spans = (starts.contiguous(), ranks.contiguous())
        m, s = self.rows, self.count
        if m > _MOST_COUNTED:
            base = (adapters < 0) | (adapters >= s)
            self.order = adapters.masked_fill(base, s).sort(stable=True).indices.to(torch.int32)
        else:
            self.order = adapters.new_empty((m,), dtype=torch.int32)
        self.bounds = adapters.new_empty((s + 2,), dtype=torch.int32)
        counted, bq = m if m <= _MOST_COUNTED else 0, 16
        host.launch(kernels.plan_kernel, (single._cdiv(counted + s + 2, bq),), self.adapters, self.order, self.bounds,
                    m, s, counted, BQ=bq, BM=64, num_warps=4, num_stages=1)  # fmt: skip

    def tiles(self, size: int) -> int:
        return most_tiles(self.rows, self.count, size)

    @property
    def groups(self) -> int:
        """Adapters in use, at most."""
        return min(self.count, self.rows)

    def each(self) -> int:
        return rows_each(self.rows, self.count)


def _terms(c: tuning.Config, r: int, either: bool) -> dict[str, Any]:
    """How a tile adds its adapters' terms: see the top. either: where a tile may choose."""
    by_row: int | None = -1 if c.BM <= _FEW_ROWS else _FEW_STEPS
    if (_MOST_ROWS if either else _FEW_ROWS) < c.BM or r > _MOST_RANK:
        by_row = None
    br = min(1 << (r - 1).bit_length(), _RANKS)
    return {"BY_ROW": by_row, "BU": _RANKS // br, "BR": br}


def _project(x: Tensor, a: Tensor, plan: _Plan, drop: single._Dropout, scale: bool, arch: str) -> Tensor:
    """s [M, max_rank] = drop(x) A_i^T, float32; scale: times scaling_i."""
    from . import triton_kernels as kernels

    (m, k), r = x.shape, plan.max_rank
    shape = tuning.Shape(plan.each(), r, k, r, x.element_size() * 8, plain=k % 16 == 0)
    c = tuning.choose("project", arch, shape)
    br = single._rank_tile(r, c.BR)
    tiles = (plan.tiles(c.BM), single._cdiv(r, br))
    parts, steps = single._split(k, c.BK, tiles[0] * tiles[1], c.programs, 4)
    out = torch.empty((m, r), dtype=torch.float32, device=x.device)
    s = out if parts == 1 else out.new_empty((parts, m, r))
    host.launch(kernels.multi_project_kernel, (*tiles, parts), x, a, s, drop.seed, plan.order, plan.bounds, *plan.spans,
                plan.scaling, m, k, r, plan.count, plan.stacked, steps, *drop.arguments, SCALE=scale, **drop.constants,
                BM=c.BM, BK=c.BK, BR=br, **single._options(c))  # fmt: skip
    return s if parts == 1 else single._reduce(s, out, 1.0)


def _outer(
    z: Tensor, t: Tensor, b: Tensor | None, out: Tensor, plan: _Plan, drop: single._Dropout, arch: str
) -> Tensor | None:
    """out [P, C]: t^T drop(z) of each adapter's rows, in its rows; with b [P, C] that times scaling_i, and also returns
    ds [M, max_rank] = scaling_i * z B_i^T, in the same pass over z. `out` is zero before."""
    from . import triton_kernels as kernels

    (m, c_), r = z.shape, plan.max_rank
    shape = tuning.Shape(m, c_, c_, r, z.element_size() * 8, plain=c_ % 16 == 0)
    c = tuning.choose("outer", arch, shape)
    # rows by index need registers: a tile as wide as lora_linear's would spill, with two products or narrow loads
    c = replace(c, BN=min(c.BN, 16 if not shape.plain else c.BN if b is None else 64))
    br = single._rank_tile(r, c.BR)
    tiles = (single._cdiv(c_, c.BN), single._cdiv(r, br))
    # by what the shapes say of the groups: with many adapters, a part of each is enough
    parts, _ = single._split(plan.each(), c.BM, tiles[0] * tiles[1] * plan.groups, c.programs, 2)
    sums = out if parts == 1 else torch.zeros((parts, *out.shape), dtype=torch.float32, device=z.device)
    shares = sums if b is None else torch.empty((tiles[0], m, r), dtype=torch.float32, device=z.device)
    host.launch(kernels.multi_outer_kernel, (*tiles, parts * plan.tiles(m)), z, t, t if b is None else b, sums, shares,
                drop.seed, plan.order, plan.bounds, *plan.spans, plan.scaling, m, c_, r, plan.count, plan.stacked,
                parts, *drop.arguments, WITH_DS=b is not None, **drop.constants, BM=c.BM, BC=c.BN, BR=br,
                **single._options(c))  # fmt: skip
    if parts > 1:
        single._reduce(sums, out, 1.0)
    return None if b is None else single._reduce(shares, shares.new_empty((m, r)), 1.0)


def _tile(
    kernel: str, x: Tensor, w: single._Weight, r: int, plain: bool, vendor: bool, arch: str
) -> tuple[tuning.Config, int, int, int]:
    """(configuration, tiles, parts, steps) of the product with W in "forward" or "backward"."""
    m, (n, k) = x.shape[0], w.shape
    shape = tuning.Shape(m, n, k, r, x.element_size() * 8, plain and w.plain, w.blocksize)
    own = f"multi_{kernel}"  # where the tile of a single adapter's product would spill with adapters of many rows
    has_own = own in tuning.table(arch)["kernels"] and tuning.rows(own, arch, shape)
    c = tuning.choose(own if has_own else kernel, arch, shape)
    out, summed = ((n, c.BN), (k, c.BK)) if kernel == "forward" else ((k, c.BK), (n, c.BN))
    tiles = single._cdiv(m, c.BM) * single._cdiv(*out)
    # without steps the kernel writes what the vendor's product is added to
    return c, tiles, *((1, 0) if vendor else single._split(*summed, tiles, c.programs, 4))


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], s [M, max_rank])."""
    from . import triton_kernels as kernels

    x = x.contiguous()
    (m, k), n, r = x.shape, out_features, max_rank
    arch = tuning.arch_of(x.device)
    y = x.new_empty((m, n))
    w = single._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n,
                       k, x.dtype)  # fmt: skip
    if 0 in (m, starts.shape[0], a.shape[0], r):  # no row can have an adapter
        single.product(x, w, None, None, 1.0, bias, y, arch)
        return y, x.new_zeros((m, r), dtype=torch.float32)
    plan = _Plan(adapters, starts, ranks, scaling, r, a)
    s = _project(x, a.contiguous(), plan, single._Dropout(dropout_p, seed, k, x), False, arch)
    if y.numel() == 0:
        return y, s
    vendor = panels.use(x, w.dense, arch)
    c, tiles, parts, steps = _tile("forward", x, w, r, k % 16 == 0, vendor, arch)
    out = y if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
    host.launch(kernels.multi_forward_kernel, (tiles, parts), x, *w.pointers, s, b.contiguous(),
                x if bias is None else bias.contiguous(), out, plan.order, plan.adapters, *plan.spans, plan.scaling,
                m, n, k, r, plan.count, plan.stacked, *w.strides, steps, BIAS=bias is not None, **w.constants,
                PRECISION=single._precision(x.dtype), BM=c.BM, BN=c.BN, BK=c.BK, **_terms(c, r, b.element_size() == 2),
                **single._tiling(c, n, k))  # fmt: skip
    if parts > 1:
        single._reduce(out, y, 1.0)
    if vendor:
        panels.multiply(x, w, y, True, True, arch)
    return y, s


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    dropout_p: float, seed: Tensor | None, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [P, K], db [P, N]); empty where not needed, zero in da and db where no row of x reaches."""
    dy = dy.contiguous()
    (m, n), k, r = dy.shape, x.shape[1], max_rank
    arch = tuning.arch_of(dy.device)
    da, db = (t.new_zeros(t.shape if need_ab else (0,)) for t in (a, b))
    w = single._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n,
                       k, dy.dtype)  # fmt: skip
    drop, off = single._Dropout(dropout_p, seed, k, dy), single._Dropout(0.0, None, 4, dy)
    if 0 in (m, starts.shape[0], a.shape[0], r):
        return single._input_gradient(dy, w, None, None, drop, k, arch) if need_dx else dy.new_empty((0,)), da, db
    plan = _Plan(adapters, starts, ranks, scaling, r, a)
    a, b = a.contiguous(), b.contiguous()
    ds: Tensor | None
    if need_ab:
        ds = _outer(dy, s.contiguous(), b, db, plan, off, arch)
        assert ds is not None
        _outer(x.contiguous(), ds, None, da, plan, drop, arch)
    else:
        ds = _project(dy, b, plan, off, True, arch)
    return _input_gradient(dy, w, ds, a, plan, drop, arch) if need_dx else dy.new_empty((0,)), da, db


def _input_gradient(
    dy: Tensor, w: single._Weight, ds: Tensor, a: Tensor, plan: _Plan, drop: single._Dropout, arch: str
) -> Tensor:
    """dx = dy W + drop'(ds A_i)."""
    from . import triton_kernels as kernels

    (m, n), k, r = dy.shape, w.shape[1], plan.max_rank
    dx = dy.new_empty((m, k))
    if dx.numel() == 0:
        return dx
    vendor = panels.use(dy, w.dense, arch, backward=True)
    c, tiles, parts, steps = _tile("backward", dy, w, r, k % 16 == 0 and n % 16 == 0, vendor, arch)
    out = dx if parts == 1 else torch.empty((parts, m, k), dtype=torch.float32, device=dy.device)
    host.launch(kernels.multi_backward_kernel, (tiles, parts), dy, *w.pointers, ds, a, drop.seed, out, plan.order,
                plan.adapters, *plan.spans, m, n, k, r, plan.count, plan.stacked, *w.strides, steps, *drop.arguments,
                **drop.constants, **w.constants, PRECISION=single._precision(dy.dtype), BM=c.BM, BN=c.BN, BK=c.BK,
                **_terms(c, r, False), **single._tiling(c, n, k))  # fmt: skip
    if parts > 1:
        single._reduce(out, dx, 1.0)
    if vendor:
        panels.multiply(dy, w, dx, True, False, arch)
    return dx


def _when(x: Tensor, *args: Any) -> str | None:
    adapters = args[13].shape[0]  # of the forward's ranks, or the backward's starts
    if min(adapters, x.shape[0]) + 2 > host.MOST_BLOCKS:
        return f"does not serve more than {host.MOST_BLOCKS - 2} adapters in as many rows"
    return host.wrong_mode(x)


BACKENDS = host.backends({"multi_lora_linear": forward, "multi_lora_linear_backward": backward}, _when)
