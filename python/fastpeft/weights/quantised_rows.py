"""Some rows, or matrices, of a quantised weight, without decoding the others."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit


def quantised_rows(weight: QuantWeight, index: slice | Tensor) -> Tensor | None:
    """Some of the matrices, or rows, of a quantised weight in float32; None where its blocks straddle them."""
    some = weight.take(index)
    return None if some is None else dequantize_4bit(some, dtype=torch.float32)


def size_of_one(weight: QuantWeight) -> int:
    """Elements of a row, or of a matrix of [E, N, K]."""
    return weight.numel // max(1, weight.shape[0])
