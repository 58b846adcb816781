"""dequantize_4bit on the native CUDA library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import native
from ...cuda_rt import backend, launching
from ...formats import contiguous, table
from . import refuse_dtype


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = packed.new_empty(shape, dtype=dtype)
    nested = (None, None, None) if nested_absmax is None else (nested_absmax, nested_code, offset)
    packed, absmax, *nested = contiguous(packed, absmax, *nested)
    with launching(packed) as (device, stream):
        native.check(
            native.cuda().pk_cuda_dequantize_4bit(
                packed.data_ptr(), absmax.data_ptr(), *(None if t is None else t.data_ptr() for t in nested),
                table(quant_type, "cpu").data_ptr(), blocksize, nested_blocksize, math.prod(shape),
                native.DTYPES[dtype], out.data_ptr(), device, stream,
            ), "cuda",
        )  # fmt: skip
    return out


BACKENDS = {
    "dequantize_4bit": backend(dequantize_4bit, dtypes=frozenset({torch.uint8}), when=refuse_dtype),
}
