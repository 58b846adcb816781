"""Triton backend of lora_linear_stacked: the host side. The kernels are in `triton_kernels.py`, imported on first use.

The sums s = drop(x) A^T of all projections without dropout are one projection of x onto their A's, stacked; then one
launch for every y. The backward is one launch for dx; dS and dB come from one pass over each dy; the dA of all
projections without dropout from one pass over x. With so many rows of 16-bit x that W is decoded for a vendor's matmul
(`lora_linear/triton.py`), that matmul reads x at its own pace: a product for each projection, in either direction, and
the products of the gradient of x are added in one pass; S and dA stay one pass over x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...formats import contiguous
from ...triton_lib import host
from ..lora_linear import panels
from ..lora_linear import triton as single
from . import each

_MOST = 4  # projections in a launch: each is code of its own in the kernels
_MOST_ROWS = 64  # of a tile: the kernels hold what every projection needs, so larger tiles would spill


def _when(x: Tensor, first: Sequence[Any], *_: Any) -> str | None:
    if len(first) > _MOST:
        return f"does not serve more than {_MOST} projections at once"
    return host.wrong_mode(x)


def _weights(x: Tensor, lists: Sequence[Sequence[Any]], features: Sequence[int]) -> list[Any]:
    k = x.shape[1]
    return [single._Weight(*w, n, k, x.dtype) for w, n in zip(each(lists), features, strict=True)]


def _of_weights(weights: Sequence[Any]) -> tuple[list[tuple[Any, ...]], list[tuple[int, ...]], dict[str, Any]]:
    """(pointers, strides, constants) as the kernels take them: by field, an entry per projection."""
    constants = {name: tuple(w.constants[name] for w in weights) for name in weights[0].constants}
    pointers, strides = (list(zip(*fields, strict=True)) for fields in (
        [w.pointers for w in weights], [w.strides for w in weights]
    ))  # fmt: skip
    return pointers, strides, constants


def _config(kernel: str, x: Tensor, n: int, k: int, r: int, weights: Sequence[Any], plain: bool) -> tuning.Config:
    """The first row of the table for a layer of the stack's size whose tile leaves room for several projections."""
    shape = tuning.Shape(x.shape[0], n, k, r, x.element_size() * 8, plain and all(w.plain for w in weights),
                         min(w.blocksize for w in weights))  # fmt: skip
    arch = tuning.arch_of(x.device)
    chosen = tuning.choose(kernel, arch, shape)
    if chosen.BM > _MOST_ROWS:
        fitting = [c for c in tuning.rows(kernel, arch, shape) if c.BM <= _MOST_ROWS]
        chosen = fitting[0] if fitting else replace(chosen, BM=_MOST_ROWS)
    # four adapters' terms beside the sum would spill with the threads that one layer's tile has
    return replace(chosen, num_warps=max(chosen.num_warps, 8)) if len(weights) == _MOST else chosen


def _tiling(config: tuning.Config, features: Sequence[int], k: int) -> dict[str, Any]:
    """Arguments of the kernels beside their tiles: as in lora_linear, EVEN_N by projection."""
    return {**single._tiling(config, 0, k), "EVEN_N": tuple(n % config.BN == 0 for n in features)}


def _plain(drops: Sequence[single._Dropout], a: Sequence[Tensor | None]) -> list[int]:
    """The adapters without dropout, where one pass over x can serve them together."""
    found = [i for i, t in enumerate(a) if t is not None and t.shape[0] > 0 and not drops[i].on]
    one = len({t.dtype for i, t in enumerate(a) if i in found and t is not None}) == 1
    return found if one and len(found) > 1 else []


def forward(x: Tensor, *lists: list[Any]) -> list[Tensor]:
    """Every y [M, N_i], then every s [M, r_i]; s is empty without an adapter."""
    from . import triton_kernels as kernels

    features, a, b, scaling, bias, p, seed = lists[8:]
    x = x.contiguous()
    (m, k), count, arch = x.shape, len(features), tuning.arch_of(x.device)
    weights = _weights(x, lists[:8], features)
    drops = [single._Dropout(q, t, k, x) for q, t in zip(p, seed, strict=True)]
    a, b, bias = (contiguous(*ts) for ts in (a, b, bias))
    together = _plain(drops, a)
    ss: list[Tensor] = [x.new_empty((0,), dtype=torch.float32) for _ in a]
    if together:
        s = single._project(x, torch.cat([a[i] for i in together]), drops[together[0]], arch)
        for i, part in zip(together, s.split([a[i].shape[0] for i in together], 1), strict=True):
            ss[i] = part.contiguous()
    for i, t in enumerate(a):
        if t is not None and i not in together:
            ss[i] = single._project(x, t, drops[i], arch)
    ys = [x.new_empty((m, n)) for n in features]
    if count == 1 or any(panels.use(x, w.dense, arch) for w in weights):
        for i, y in enumerate(ys):
            single.product(x, weights[i], None if a[i] is None else ss[i], b[i], scaling[i], bias[i], y, arch)
        return ys + ss
    ranks = [0 if t is None else t.shape[0] for t in a]
    c = _config("forward", x, sum(features), k, max(ranks), weights, k % 16 == 0)
    tiles = sum(single._cdiv(m, c.BM) * single._cdiv(n, c.BN) for n in features)
    parts, steps = single._split(k, c.BK, tiles, c.programs, 4)
    outs = ys if parts == 1 else [torch.empty((parts, *y.shape), dtype=torch.float32, device=x.device) for y in ys]
    pointers, strides, constants = _of_weights(weights)
    host.launch(
        kernels.stacked_forward_kernel, (tiles, parts), x, *pointers,
        *(tuple(x if t is None or not t.numel() else t for t in ts) for ts in (ss, b, bias)), tuple(outs),
        tuple(features), tuple(ranks), *strides, tuple(map(float, scaling)), m, k, steps, COUNT=count,
        ADAPTER=tuple(r > 0 for r in ranks), BIAS=tuple(t is not None for t in bias), **constants,
        PRECISION=single._precision(x.dtype), BM=c.BM, BN=c.BN, BK=c.BK, BR=single._rank_tile(max(ranks), c.BR),
        **_tiling(c, features, k),
    )  # fmt: skip
    if parts > 1:
        for out, y in zip(outs, ys, strict=True):
            single._reduce(out, y, 1.0)
    return ys + ss


def backward(x: Tensor, *args: Any) -> list[Tensor]:
    """dx [M, K], every da [r_i, K], every db [N_i, r_i]; empty where not needed."""
    dys, *lists, need_dx, need_ab = args
    a, b, ss, scaling, p, seed = lists[8:]
    x, dys = x.contiguous(), [t.contiguous() for t in dys]
    arch, k = tuning.arch_of(x.device), x.shape[1]
    drops = [single._Dropout(q, t, k, x) for q, t in zip(p, seed, strict=True)]
    off = single._Dropout(0.0, None, 4, x)
    a, b = contiguous(*a), contiguous(*b)
    das, dbs = ([torch.empty_like(t) if w else x.new_empty((0,)) for t, w in zip(ts, need_ab, strict=True)]
                for ts in (a, b))  # fmt: skip
    dss: list[Tensor | None] = [None] * len(dys)
    for i, dy in enumerate(dys):
        if a[i] is None or a[i].shape[0] == 0:
            continue
        if need_ab[i]:
            dss[i] = single._outer(dy, ss[i].contiguous(), b[i], dbs[i], (b[i].shape[1], 1), scaling[i], off, arch)
        else:
            dss[i] = single._project(dy, b[i].t().contiguous(), off, arch).mul_(scaling[i])
    wanted = [i for i, w in enumerate(need_ab) if w and dss[i] is not None]
    together = [i for i in _plain(drops, a) if i in wanted]
    if together:
        ds = torch.cat([dss[i] for i in together], 1)  # type: ignore[misc]  # none of these is None
        stacked = torch.empty((ds.shape[1], k), dtype=a[together[0]].dtype, device=x.device)
        single._outer(x, ds, None, stacked, (1, k), 1.0, off, arch)
        for i, part in zip(together, stacked.split([a[i].shape[0] for i in together]), strict=True):
            das[i].copy_(part)
    for i in wanted:
        if i not in together:
            single._outer(x, dss[i], None, das[i], (1, k), 1.0, drops[i], arch)  # type: ignore[arg-type]
    dx = _input_gradient(x, dys, lists, dss, a, drops, arch) if need_dx else x.new_empty((0,))
    return [dx, *das, *dbs]


def _input_gradient(
    x: Tensor, dys: list[Tensor], lists: Sequence[Sequence[Any]], dss: list[Tensor | None], a: list[Tensor | None],
    drops: list[single._Dropout], arch: str,
) -> Tensor:  # fmt: skip
    from . import triton_kernels as kernels

    m, k = x.shape
    features = [dy.shape[1] for dy in dys]
    weights = _weights(x, lists[:8], features)
    if len(dys) == 1:
        return single._input_gradient(dys[0], weights[0], dss[0], a[0], drops[0], k, arch)
    if any(panels.use(x, w.dense, arch, backward=True) for w in weights):
        parts = x.new_empty((len(dys), m, k))
        for dy, w, ds, t, drop, part in zip(dys, weights, dss, a, drops, parts, strict=True):
            single._input_gradient(dy, w, ds, t, drop, k, arch, part)
        return single._reduce(parts, x.new_empty((m, k)), 1.0)  # one pass; the sum is float32
    dx = x.new_empty((m, k))
    ranks = [0 if ds is None else ds.shape[1] for ds in dss]
    plain = k % 16 == 0 and all(n % 16 == 0 for n in features)
    c = _config("backward", x, sum(features), k, max(ranks), weights, plain)
    tiles, steps_in = single._cdiv(m, c.BM) * single._cdiv(k, c.BK), sum(single._cdiv(n, c.BN) for n in features)
    parts, steps = single._split(steps_in * c.BN, c.BN, tiles, c.programs, 4)
    out = dx if parts == 1 else torch.empty((parts, m, k), dtype=torch.float32, device=x.device)
    pointers, strides, constants = _of_weights(weights)
    bounds, keeps = zip(*(drop.arguments for drop in drops), strict=True)
    host.launch(
        kernels.stacked_backward_kernel, (tiles, parts), out, tuple(dys), *pointers,
        tuple(x if t is None else t for t in dss), tuple(x if t is None else t for t in a),
        tuple(drop.seed for drop in drops), tuple(features), tuple(ranks), *strides, bounds, keeps, m, k, steps,
        COUNT=len(dys), ADAPTER=tuple(r > 0 for r in ranks), DROPOUT=tuple(drop.on for drop in drops),
        BY_FOUR=k % 4 == 0, **constants, PRECISION=single._precision(x.dtype), BM=c.BM, BN=c.BN, BK=c.BK,
        BR=single._rank_tile(max(ranks), c.BR), **_tiling(c, features, k),
    )  # fmt: skip
    return dx if parts == 1 else single._reduce(out, dx, 1.0)


BACKENDS = host.backends({"lora_linear_stacked": forward, "lora_linear_stacked_backward": backward}, _when)
