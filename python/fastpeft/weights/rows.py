"""Reading a base weight row by row, so that what needs all of W (norms, products) never holds a dense copy of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels
from peft_kernels import QuantWeight

TILE = 1 << 22  # elements of W that are decoded at a time


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to merge in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class WeightRows:
    """The part of `BaseWeight` that reads some of a weight."""

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, ...]:
        raise NotImplementedError

    @classmethod
    def read(cls, module: nn.Module) -> Any:
        raise NotImplementedError

    @classmethod
    def rows(cls, module: nn.Module, index: slice | Tensor) -> Tensor:
        """Some rows of W as [rows, columns], in at least float32, without decoding the others."""
        w: Tensor = cls.read(module)[0]
        return w[index].to(wide(w.dtype)).flatten(1)

    @classmethod
    def _tiles(cls, module: nn.Module) -> list[slice]:
        n, *others = cls.shape(module)
        step = max(1, TILE // max(1, math.prod(others)))
        return [slice(i, i + step) for i in range(0, n, step)]


def quant_rows(qw: QuantWeight, index: slice | Tensor) -> Tensor | None:
    """Some rows of a 4-bit weight in float32; None where its blocks straddle rows."""
    n, k = qw.shape
    if k % qw.blocksize or k % 2:
        return None
    scales = qw.absmax
    if qw.nested_absmax is not None and qw.nested_code is not None and qw.offset is not None:
        outer = qw.nested_absmax.repeat_interleave(qw.nested_blocksize)[: len(scales)]
        scales = qw.nested_code[scales.long()] * outer + qw.offset
    packed = qw.packed.view(n, -1)[index].contiguous()
    some = QuantWeight(packed, scales.view(n, -1)[index].reshape(-1), (len(packed), k), qw.quant_type, qw.blocksize)
    return peft_kernels.dequantize_4bit(some, dtype=torch.float32)
