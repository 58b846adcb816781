"""Quantisers of integers by group, with the bits of their owners: HQQ's of 4 and 8 bits, torchao's of int8."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import arg_error
from .format import Parts, pieces, rows_of

_ROUNDS, _POWER, _WEIGHT = 20, 0.7, 1 / 10.0  # HQQ's iters, lp_norm and 1 / beta


def _groups(w: Tensor, blocksize: int) -> Tensor:
    """w as [groups, blocksize], of its dtype. ValueError unless groups divide a row."""
    if w.dim() < 1 or blocksize < 1 or w.shape[-1] % blocksize:
        raise arg_error("quantize", "w", f"of rows in groups of {blocksize}", tuple(w.shape))
    return w.reshape(-1, blocksize)


def to_int8(w: Tensor, blocksize: int | None = None) -> Parts:
    """int8 without zeros, as torchao's `Int8Tensor.from_hp` makes it: by row, or by groups of `blocksize` columns.

    The scale of a group is its largest magnitude / 127.5, taken in w's dtype; scales are float32.
    """
    blocksize = max(1, w.shape[-1]) if blocksize is None and w.dim() else blocksize or 1
    flat = _groups(w, blocksize)
    packed = w.new_empty(flat.shape, dtype=torch.uint8)
    scales = w.new_empty((len(flat), 1), dtype=torch.float32)
    for some in pieces(len(flat), blocksize):
        low, high = flat[some].amin(dim=1, keepdim=True).clamp(max=0), flat[some].amax(dim=1, keepdim=True).clamp(min=0)
        scale = (torch.maximum(-low, high) / 127.5).clamp(min=torch.finfo(torch.float32).eps).to(torch.float32)
        packed[some] = (flat[some] * (1.0 / scale)).round().clamp(-128, 127).to(torch.int8).view(torch.uint8)
        scales[some] = scale
    rows = rows_of(w.shape)[0]
    return Parts(packed.view(w.shape), scales.view(rows, w.shape[-1] // blocksize), None, None, None, blocksize, 256)


def to_hqq(bits: int, w: Tensor, blocksize: int | None = None) -> Parts:
    """HQQ's codes of 4 or 8 bits with real zeros, as its `Quantizer` makes them along rows in its own settings.

    Zeros are moved for up to 20 rounds, while the mean error of the whole weight falls: that needs one float32 copy of
    w. blocksize: columns a group; None: 64. Scales and zeros have w's dtype, as those of an `HQQLinear` have.
    """
    blocksize = 64 if blocksize is None else blocksize
    flat, most = _groups(w, blocksize), 2**bits - 1
    scale, zero = (w.new_empty((len(flat), 1), dtype=torch.float32) for _ in range(2))
    for some in pieces(len(flat), blocksize):
        v = flat[some].to(torch.float32)
        low = v.amin(dim=1, keepdim=True)
        width = v.amax(dim=1, keepdim=True) - low
        scale[some] = torch.where(width <= 1e-4, 1.0, most / width).clamp(max=2e4)
        zero[some] = -low * scale[some]
    if bits == 4:
        zero.round_()
    error, best = w.new_empty(flat.shape, dtype=torch.float32), float("inf")
    for _ in range(_ROUNDS if len(flat) else 0):
        for some in pieces(len(flat), blocksize):
            v, s = flat[some].to(torch.float32), scale[some]
            codes = (v * s + zero[some]).round_().clamp_(0, most)
            off = v - (codes - zero[some]) / s
            size = torch.abs(off, out=error[some])
            shrunk = (size - _WEIGHT * size.pow(_POWER - 1)).clamp_(min=0).mul_(off.sign())
            zero[some] = (codes - (v - shrunk) * s).mean(dim=1, keepdim=True)
        now = float(error.mean())
        if not now < best:
            break
        best = now
    del error
    packed = w.new_empty((len(flat), blocksize), dtype=torch.uint8)
    for some in pieces(len(flat), blocksize):
        packed[some] = (flat[some].to(torch.float32) * scale[some] + zero[some]).round_().clamp_(0, most)
    if bits == 4:
        codes = torch.nn.functional.pad(packed.view(-1), (0, packed.numel() % 2))
        packed = (codes[::2] << 4) | codes[1::2]
    rows, dtype = rows_of(w.shape)[0], torch.float32 if w.dtype is torch.float64 else w.dtype
    scales, zeros = (t.view(rows, w.shape[-1] // blocksize).to(dtype) for t in (1.0 / scale, zero))
    return Parts(packed, scales, zeros, None, None, blocksize, 256)
