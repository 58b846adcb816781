"""dequantize_4bit on Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...formats import table
from ...triton_lib import host
from . import refuse_dtype

BYTES = 1024  # per program


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from .triton_kernels import dequantize_kernel

    out = packed.new_empty(shape, dtype=dtype)
    numel = math.prod(shape)
    absmax = absmax.contiguous()
    # where there is no nesting the kernel never reads these; a pointer has to be given
    nested = [absmax if t is None else t.contiguous() for t in (nested_absmax, nested_code, offset)]
    host.launch(
        dequantize_kernel, (-(-numel // (2 * BYTES)),), packed.contiguous(), absmax, *nested,
        table(quant_type, packed.device), out, numel, NESTED=nested_absmax is not None, BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize, BYTES=BYTES, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _when(packed: Tensor, *args: object) -> str | None:
    return refuse_dtype(packed, *args) or host.wrong_mode(packed)


BACKENDS = host.backends({"dequantize_4bit": dequantize_4bit}, _when, dtypes=frozenset({torch.uint8}))
