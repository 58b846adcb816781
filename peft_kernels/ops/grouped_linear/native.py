"""The native CPU backend of grouped_linear: one call for all groups, over the kernels of lora_linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...formats import contiguous
from ..lora_linear.native import backend, pack, refusal

_F32 = torch.float32


def _refusal(
    k: int, n: int, weight: Tensor, nested: bool, quant_type: int, blocksize: int, nested_blocksize: int, groups: int,
    a: Tensor | None, b: Tensor | None, bias: Tensor | None,
) -> str | None:  # fmt: skip
    unit = blocksize * (nested_blocksize if nested else 1)
    if quant_type > 2:  # groups and blocks are of columns of a row
        unit = 2 if quant_type == 3 else 1
    if quant_type and groups > 1 and n * k % unit:
        return f"the weight of a group, {n} x {k}, is no multiple of {unit} elements, which are stored together"
    return refusal(weight, quant_type, a, b, bias)


def _when_forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, offsets: Tensor, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None,
) -> str | None:  # fmt: skip
    return _refusal(x.shape[1], out_features, weight, nested_absmax is not None, quant_type, blocksize,
                    nested_blocksize, offsets.shape[0] - 1, a, b, bias)  # fmt: skip


def _when_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    offsets: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, need_dx: bool, need_ab: bool,
) -> str | None:  # fmt: skip
    return _refusal(x.shape[1], dy.shape[1], weight, nested_absmax is not None, quant_type, blocksize,
                    nested_blocksize, offsets.shape[0] - 1, a, b, None)  # fmt: skip


def _laid(weight: Tensor, quant_type: int, a: Tensor | None, b: Tensor | None) -> tuple[Any, ...]:
    """(turned, weight, a, b): matrices of the groups one after another, row by row or (turned) column by column."""
    turned = quant_type == 0 and not weight.is_contiguous() and weight.mT.is_contiguous()
    if turned:
        a, b = None if a is None else a.mT, None if b is None else b.mT
    return turned, weight if turned else weight.contiguous(), *contiguous(a, b)


def _ranked(a: Tensor | None, r: int) -> Tensor | None:
    """The factors of all groups as `pack` measures one: r rows."""
    return None if a is None else a.view(r, a.numel() // r if r else 0)


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, offsets: Tensor, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [M, N]."""
    r = 0 if a is None else a.shape[1]
    turned, weight, a, b = _laid(weight, quant_type, a, b)
    x, absmax, nested_absmax, nested_code, offset, offsets, bias = contiguous(
        x, absmax, nested_absmax, nested_code, offset, offsets, bias
    )
    y, s = x.new_empty((x.shape[0], out_features)), x.new_empty((x.shape[0], r), dtype=_F32)
    args = pack(torch.get_num_threads(), x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                nested_blocksize, out_features, _ranked(a, r), b, scaling, bias, 0.0, None, y=y, s=s)  # fmt: skip
    native.check(native.cpu().pk_cpu_grouped_linear(args, offsets.data_ptr(), offsets.shape[0] - 1, turned))
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    offsets: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [E, r, K], db [E, N, r]); empty where not needed."""
    r = 0 if a is None else a.shape[1]
    turned, weight, a, b = _laid(weight, quant_type, a, b)
    dy, x, absmax, nested_absmax, nested_code, offset, offsets = contiguous(
        dy, x, absmax, nested_absmax, nested_code, offset, offsets
    )
    none = x.new_empty((0,))
    s, da, db = x.new_empty((x.shape[0], r), dtype=_F32), none, none
    if need_ab:
        assert a is not None
        assert b is not None
        da, db = torch.empty_like(a), torch.empty_like(b)
    dx = torch.empty_like(x) if need_dx or (turned and need_ab) else none  # turned: s comes with it
    args = pack(torch.get_num_threads(), x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                nested_blocksize, dy.shape[1], _ranked(a, r), b, scaling, None, 0.0, None, s=s, dy=dy, dx=dx, da=da,
                db=db)  # fmt: skip
    native.check(native.cpu().pk_cpu_grouped_linear_backward(args, offsets.data_ptr(), offsets.shape[0] - 1, turned))
    if turned and need_ab:
        da, db = da.mT.contiguous(), db.mT.contiguous()
    return dx if need_dx else none, da, db


BACKENDS: dict[str, Backend] = {
    "grouped_linear": backend(forward, _when_forward),
    "grouped_linear_backward": backend(backward, _when_backward),
}
