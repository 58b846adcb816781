"""dequantize_4bit on the native CPU library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import native
from ...dispatch import ALL_FORMATS, Backend
from ...formats import contiguous
from ..lora_linear.native import group_dtypes
from . import refuse_dtype


def dequantize_4bit(
    packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = packed.new_empty(shape, dtype=dtype)
    if quant_type > 2:
        return _in_groups(out, *contiguous(packed, absmax, nested_absmax, nested_code, offset), quant_type, blocksize)
    nested = (None, None, None) if nested_absmax is None else (nested_absmax, nested_code, offset)
    packed, absmax, *nested = contiguous(packed, absmax, *nested)
    native.check(
        native.cpu().pk_cpu_dequantize_4bit(
            packed.data_ptr(), absmax.data_ptr(), *map(native.pointer, nested), quant_type, blocksize,
            nested_blocksize, math.prod(shape), native.DTYPES[dtype], out.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return out


def _in_groups(
    out: Tensor, packed: Tensor, scales: Tensor | None, zeros: Tensor | None, index: Tensor | None,
    shifts: Tensor | None, quant_type: int, blocksize: int,
) -> Tensor:  # fmt: skip
    columns = out.shape[-1] if out.dim() else 1
    w_dtype, zero_dtype = group_dtypes(scales, zeros)
    native.check(
        native.cpu().pk_cpu_dequantize_rows(
            *map(native.pointer, (packed, scales, zeros, index, shifts)), quant_type, blocksize, zero_dtype, w_dtype,
            out.numel() // max(columns, 1), columns, native.DTYPES[out.dtype], out.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return out


BACKENDS = {
    "dequantize_4bit": Backend(
        "native",
        dequantize_4bit,
        frozenset({"cpu"}),
        dtypes=frozenset({torch.uint8}),
        available=native.available,
        when=refuse_dtype,
        formats=ALL_FORMATS,
    ),
}
