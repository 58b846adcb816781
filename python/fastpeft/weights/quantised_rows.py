"""Some rows, or matrices, of a quantised weight without decoding the others, and new values in its format."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit
from peft_kernels.formats import FORMATS


def quantised_rows(weight: QuantWeight, index: slice | Tensor) -> Tensor | None:
    """Some of the matrices, or rows, of a quantised weight in float32; None where its blocks straddle them."""
    some = weight.take(index)
    return None if some is None else dequantize_4bit(some, dtype=torch.float32)


def size_of_one(weight: QuantWeight) -> int:
    """Elements of a row, or of a matrix of [E, N, K]."""
    return weight.numel // max(1, weight.shape[0])


def requantised(w: Tensor, like: QuantWeight) -> QuantWeight:
    """W, float32, in the format of `like`, which is not NF4 or FP4, and with scales of its dtype. ValueError where only
    the owner's files have the format."""
    if (reason := no_quantiser(like.quant_type)) is not None:
        raise ValueError(reason)
    if like.absmax is not None and like.absmax.is_floating_point():
        w = w.to(like.absmax.dtype)
    return replace(QuantWeight.quantize(w, like.quant_type, like.blocksize), dtype=like.dtype)


def no_quantiser(quant_type: str) -> str | None:
    """The reason why nothing can be merged into a weight of this format; None where it can be quantised again."""
    if FORMATS[quant_type].quantize is not None:
        return None
    return (f"a merge has to quantise to {quant_type} again, and there is no quantiser for it: merge onto a dense "
            "base, or keep the adapter beside it")  # fmt: skip
