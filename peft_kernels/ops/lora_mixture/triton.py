"""Triton backend of lora_mixture: the host side. lora_linear's kernels, of one adapter that is all of them.

Between its two low-rank products stands `weigh_kernel`, which multiplies s [M, n, r] (float32, small beside x) by the
weights. What a weight of zero leaves out is left out by tiles: x A^T and dy B^T where the weights of a tile are zero,
what they are multiplied by next where s and ds are. A backward whose weights have exact gradients needs dy B^T of every
adapter: then dB is made in the same pass over dy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from ..lora_linear import triton as single


def _weigh(low: Tensor, mix: Tensor, s: Tensor | None, clear: bool, masked: bool) -> tuple[Tensor, Tensor]:
    """(low [M, n, r] times mix [M, n]; the sum over r of low times s [M, n], empty without s)."""
    from .triton_kernels import weigh_kernel

    (m, n), bm = mix.shape, 32
    r = low.numel() // max(m * n, 1)
    out, dmix = torch.empty_like(low), mix.new_empty((0,) if s is None else mix.shape)
    host.launch(weigh_kernel, (single._cdiv(m, bm), n), low, mix, out, low if s is None else s, dmix, m, r,
                CLEAR=clear, WITH_DMIX=s is not None, MASKED=masked, BM=bm, BR=single._rank_tile(r, 64), num_warps=4,
                num_stages=1)  # fmt: skip
    return out, dmix


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, mix: Tensor, masked: bool, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], s [M, n, r])."""
    x, mix, a, b = x.contiguous(), mix.contiguous(), a.contiguous(), b.contiguous()
    (m, k), n = x.shape, out_features
    arch = tuning.arch_of(x.device)
    y = x.new_empty((m, n))
    w = single._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n,
                       k, x.dtype)  # fmt: skip
    if not a.shape[1]:
        single.product(x, w, None, None, 1.0, bias, y, arch)
        return y, x.new_empty((m, *a.shape[:2]), dtype=torch.float32)
    drop = single._Dropout(dropout_p, seed, k, x)
    s = single._project(x, a.flatten(0, 1), drop, arch, mix if masked else None)
    mixed, _ = _weigh(s, mix, None, masked, masked)
    single.product(x, w, mixed, b.flatten(1), 1.0, bias, y, arch, sparse=True)
    return y, s.view(m, *a.shape[:2])


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, mix: Tensor, masked: bool, dropout_p: float, seed: Tensor | None, need_dx: bool,
    need_ab: bool, need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [n, r, K], db [N, n, r], dmix [M, n]); empty where not needed."""
    dy, mix, s, a, b = dy.contiguous(), mix.contiguous(), s.contiguous(), a.contiguous(), b.contiguous()
    (m, n), k, r = dy.shape, x.shape[1], a.shape[0] * a.shape[1]
    arch = tuning.arch_of(dy.device)
    da, db = (torch.empty_like(t) if need_ab else t.new_empty((0,)) for t in (a, b))
    dx, dmix = dy.new_empty((0,)), mix.new_zeros(mix.shape if need_mix else (0,))
    off, ds = single._Dropout(0.0, None, 4, dy), None
    if r:
        flat, both, g = s.view(m, r), b.view(n, r), None
        if need_ab:
            mixed, exact = _weigh(flat, mix, None, False, False)[0], need_mix and not masked
            g = single._outer(dy, mixed, both if exact else None, db, (r, 1), 1.0, off, arch, not exact)
        if g is None:
            g = single._project(dy, both.t().contiguous(), off, arch, mix if masked or not need_mix else None)
        ds, given = _weigh(g, mix, flat if need_mix else None, False, masked)
        dmix = given if need_mix else dmix
        if need_ab:
            drop = single._Dropout(dropout_p, seed, k, dy)
            single._outer(x.contiguous(), ds, None, da, (1, k), 1.0, drop, arch, True)
    if need_dx:
        w = single._Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                           n, k, dy.dtype)  # fmt: skip
        drop = single._Dropout(dropout_p, seed, k, dy)
        dx = single._input_gradient(dy, w, ds, a.flatten(0, 1) if r else None, drop, k, arch, sparse=r > 0)
    return dx, da, db, dmix


BACKENDS = host.backends({"lora_mixture": forward, "lora_mixture_backward": backward})
