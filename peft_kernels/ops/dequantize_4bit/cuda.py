"""dequantize_4bit on the native CUDA library."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...cuda_rt import backend, launching, queue
from ...dispatch import INT4
from ...formats import contiguous, table
from ...formats.format import ceil_div, rows_of
from ..lora_linear.native import pack
from . import refuse_dtype

Parts = tuple[Any, ...]  # packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = packed.new_empty(shape, dtype=dtype)
    if quant_type == INT4:
        return _decode_groups(out, 0, *contiguous(packed, absmax, nested_absmax, nested_code, offset), blocksize)
    nested = (None, None, None) if nested_absmax is None else (nested_absmax, nested_code, offset)
    parts = contiguous(packed, absmax, *nested)
    return _decode(out, 0, *parts, quant_type, blocksize, nested_blocksize)


def _decode(
    out: Tensor, first: int, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
) -> Tensor:  # fmt: skip
    """Elements first, ... of a weight, as many as `out` has. first: where a block of every kind begins."""
    nested = (0, 0, 0)
    if nested_absmax is not None:
        at = nested_absmax.data_ptr() + first // (blocksize * nested_blocksize) * nested_absmax.element_size()
        nested = (at, native.pointer(nested_code), native.pointer(offset))
    with launching(packed) as (device, stream):
        native.check(
            native.cuda().pk_cuda_dequantize_4bit(
                packed.data_ptr() + first // 2, absmax.data_ptr() + first // blocksize * absmax.element_size(),
                *nested, table(quant_type, "cpu").data_ptr(), blocksize, nested_blocksize, out.numel(),
                native.DTYPES[out.dtype], out.data_ptr(), device, stream,
            ), "cuda",
        )  # fmt: skip
    return out


def _decode_groups(
    out: Tensor, first: int, packed: Tensor, scales: Tensor, zeros: Tensor | None, index: Tensor | None,
    shifts: Tensor | None, blocksize: int,
) -> Tensor:  # fmt: skip
    """Rows first, ... of a weight of integers of 4 bits by group, as many as `out` has. first: where a byte begins."""
    rows, columns = rows_of(out.shape)
    if first:
        at = first * ceil_div(columns, blocksize)
        scales, zeros, shifts = (None if t is None else t.view(-1)[at:] for t in (scales, zeros, shifts))
        packed = packed.view(-1)[first * columns // 2 :]
    x = torch.empty((0, columns), dtype=torch.bfloat16, device=out.device)  # no rows: only its width is read
    args = pack(0, x, packed, scales, zeros, index, shifts, INT4, blocksize, 0, rows, None, None, 1.0, None, 0.0, None)
    queue("pk_cuda_dequantize_rows", packed, args, native.DTYPES[out.dtype], out.data_ptr())
    return out


def rows_apart(columns: int, parts: Parts) -> int:
    """The rows of a weight of so many columns between those that begin with a block of every kind of scales."""
    *_, quant_type, blocksize, nested_blocksize = parts
    if quant_type == INT4:
        return 1 + columns % 2
    block = blocksize if parts[2] is None else blocksize * nested_blocksize
    return block // math.gcd(block, columns)


def decode_rows(rows: range, columns: int, memory: Tensor, parts: Parts) -> Tensor:
    """These rows of a weight of so many columns, decoded into `memory`, whose dtype they have: [rows, columns].

    rows.start: a multiple of `rows_apart`. parts: as of `dequantize_4bit`, contiguous.
    """
    out = memory[: len(rows) * columns].view(len(rows), columns)
    if parts[5] == INT4:
        return _decode_groups(out, rows.start, *parts[:5], parts[6])
    return _decode(out, rows.start * columns, *parts)


BACKENDS = {
    "dequantize_4bit": backend(dequantize_4bit, dtypes=frozenset({torch.uint8}), when=refuse_dtype),
}
