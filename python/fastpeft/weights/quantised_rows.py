"""Some rows, or matrices, of a 4-bit weight, without decoding the others."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit
from peft_kernels.formats import decode_absmax


def quantised_rows(weight: QuantWeight, index: slice | Tensor) -> Tensor | None:
    """Some of the matrices, or rows, of a 4-bit weight in float32; None where its blocks straddle them."""
    n, size = weight.shape[0], size_of_one(weight)
    if size % weight.blocksize or size % 2:
        return None
    scales = decode_absmax(weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset,
                           weight.nested_blocksize)  # fmt: skip
    packed = weight.packed.view(n, -1)[index].contiguous()
    shape = (len(packed), *weight.shape[1:])
    some = QuantWeight(packed, scales.view(n, -1)[index].reshape(-1), shape, weight.quant_type, weight.blocksize)
    return dequantize_4bit(some, dtype=torch.float32)


def size_of_one(weight: QuantWeight) -> int:
    """Elements of a row, or of a matrix of [E, N, K]."""
    return weight.numel // max(1, weight.shape[0])
