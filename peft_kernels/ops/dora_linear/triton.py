"""Triton backend of dora_linear: the host side. lora_linear's kernels, with the gain at the end of the forward's.

Without dropout the forward is lora_linear's with a column scale, and no other launch. With dropout it is two of its
products, of d(x) and of x - d(x), the second of which is added to. The backward scales b and db by the gain where they
are, [N, r], and dy in a pass of its own; then everything is lora_linear's backward, its product with W twice with
dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from ..lora_linear import triton as lora


def _drop(x: Tensor, rest: Tensor | None, drop: lora._Dropout) -> tuple[Tensor, Tensor]:
    """(drop(x), x - drop(x)), or, given `rest`, (drop(x - rest) + rest, rest): [M, K] like x."""
    from .triton_kernels import drop_kernel

    bm, bk = 8, 128
    d = torch.empty_like(x)
    other = torch.empty_like(x) if rest is None else rest
    grid = (lora._cdiv(x.shape[0], bm), lora._cdiv(x.shape[1], bk))
    host.launch(drop_kernel, grid, x, other, d, drop.seed, *x.shape, *drop.arguments, MIX=rest is not None,
                BY_FOUR=drop.constants["BY_FOUR"], BM=bm, BK=bk, num_warps=4, num_stages=1)  # fmt: skip
    return d, other


def _scale(dy: Tensor, gain: Tensor, h: Tensor | None, with_dh: bool, arch: str) -> tuple[Tensor, Tensor]:
    """(gain * dy like dy where with_dh, the column sums of dy * h where h is given), in one pass."""
    from .triton_kernels import scale_kernel

    (m, n), bm, bn = dy.shape, 8, 128
    dh = torch.empty_like(dy) if with_dh else dy
    dgain = gain.new_empty((n if h is not None else 0,))
    parts, steps = lora._split(m, bm, lora._cdiv(n, bn), tuning.table(arch)["programs"], 4)
    sums = dgain if h is None else gain.new_empty((parts, n))
    if with_dh or h is not None:
        host.launch(scale_kernel, (lora._cdiv(n, bn), parts), dy, gain, dy if h is None else h, dh, sums, m, n, steps,
                    WITH_DH=with_dh, WITH_DGAIN=h is not None, BM=bm, BN=bn, num_warps=4, num_stages=2)  # fmt: skip
    if h is not None:
        lora._reduce(sums, dgain, 1.0)
    return dh, dgain


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int, a: Tensor,
    b: Tensor, gain: Tensor, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None, need_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [M, N], h [M, N] or empty, s [M, r])."""
    x = x.contiguous()
    (m, k), n = x.shape, out_features
    arch = tuning.arch_of(x.device)
    y = x.new_empty((m, n))
    h = x.new_empty((m, n) if need_h else (0,))
    drop = lora._Dropout(dropout_p, seed, k, x)
    w = lora._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n, k,
                     x.dtype)  # fmt: skip
    s = lora._project(x, a.contiguous(), drop, arch)
    after = lora.Gain(gain.contiguous(), h if need_h else None, drop.on)
    if drop.on:
        x, rest = _drop(x, None, drop)
        lora.product(rest, w, None, None, 1.0, bias, y, arch)
        bias = None  # y has it
    lora.product(x, w, s, b, scaling, bias, y, arch, after)
    return y, h, s


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, gain: Tensor, h: Tensor | None, s: Tensor, scaling: float, dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_ab: bool, need_gain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [r, K], db [N, r], dgain [N]); empty where not needed."""
    dy, a, gain = dy.contiguous(), a.contiguous(), gain.contiguous()
    n, k = dy.shape[1], x.shape[1]
    arch = tuning.arch_of(dy.device)
    drop, off = lora._Dropout(dropout_p, seed, k, dy), lora._Dropout(0.0, None, 4, dy)
    dh, dgain = _scale(dy, gain, h.contiguous() if need_gain and h is not None else None, need_dx, arch)
    dx, da, db = (dy.new_empty((0,)) for _ in range(3))
    column, ds = gain[:, None], None
    if a.shape[0] > 0 and (need_ab or need_dx):
        scaled = (column * b).contiguous()  # dh b = dy (gain b): ds keeps float32's accuracy
        if need_ab:
            da, rows = torch.empty_like(a), torch.empty_like(scaled)
            ds = lora._outer(dy, s.contiguous(), scaled, rows, (b.shape[1], 1), scaling, off, arch)
            assert ds is not None
            lora._outer(x.contiguous(), ds, None, da, (1, k), 1.0, drop, arch)
            db = (column * rows).to(b.dtype)
        else:
            ds = lora._project(dy, scaled.t().contiguous(), off, arch).mul_(scaling)
    elif need_ab:
        da, db = torch.empty_like(a), torch.empty_like(b)
    if need_dx:
        w = lora._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                         n, k, dy.dtype)  # fmt: skip
        dx = lora._input_gradient(dh, w, ds, a, off, k, arch)
        if drop.on:
            dx = _drop(dx, lora._input_gradient(dy, w, None, None, off, k, arch), drop)[0]
    return dx, da, db, dgain


BACKENDS = host.backends({"dora_linear": forward, "dora_linear_backward": backward})
