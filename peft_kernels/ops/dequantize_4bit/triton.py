"""dequantize_4bit on Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...formats import QUANT_NAMES, table
from ...formats.format import rows_of
from ...triton_lib import host
from ..lora_linear.panels import STEP
from . import refuse_dtype

BYTES = 1024  # per program
WIDEST = host.MOST_BLOCKS * STEP


def dequantize_4bit(
    packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from .triton_kernels import dequantize_kernel

    out = packed.new_empty(shape, dtype=dtype)
    if quant_type not in QUANT_NAMES:
        from ..lora_linear.triton import _Weight  # whose kernel of a panel decodes every format

        rows, columns = rows_of(shape)
        w = _Weight(packed.contiguous(), absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                    nested_blocksize, rows, columns, dtype)  # fmt: skip
        w._decode(range(rows), range(columns), out.view(-1))
        return out
    assert absmax is not None
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
    shape: Any = args[7]
    if args[4] not in QUANT_NAMES and shape and shape[-1] > WIDEST:
        return f"does not serve rows of more than {WIDEST} columns in this format"
    return refuse_dtype(packed, *args) or host.wrong_mode(packed)


BACKENDS = host.backends({"dequantize_4bit": dequantize_4bit}, _when, frozenset({torch.uint8}))
