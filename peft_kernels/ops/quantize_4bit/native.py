"""quantize_4bit on the native CPU library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from . import levels, nested_parts, no_nesting, outputs


def quantize_4bit(
    w: Tensor, quant_type: int, blocksize: int, nested: bool, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = w.contiguous()
    packed, absmax = outputs(w, blocksize)
    lib, threads = native.cpu(), torch.get_num_threads()
    midpoints = levels.on_device("midpoints", quant_type, w.device)
    order = levels.on_device("order", quant_type, w.device)
    native.check(
        lib.pk_cpu_quantize_4bit(
            w.data_ptr(), native.DTYPES[w.dtype], w.numel(), blocksize, midpoints.data_ptr(), order.data_ptr(),
            packed.data_ptr(), absmax.data_ptr(), threads,
        )
    )  # fmt: skip
    if not nested:
        return packed, absmax, *no_nesting(w)
    codes, nested_absmax, nested_code, offset = nested_parts(absmax, nested_blocksize)
    rounding = levels.on_device("nested_rounding", 0, w.device)
    native.check(
        lib.pk_cpu_quantize_absmax(
            absmax.data_ptr(), absmax.numel(), offset.data_ptr(), nested_blocksize, rounding.data_ptr(),
            codes.data_ptr(), nested_absmax.data_ptr(), threads,
        )
    )  # fmt: skip
    return packed, codes, nested_absmax, nested_code, offset


BACKENDS = {"quantize_4bit": Backend("native", quantize_4bit, frozenset({"cpu"}), available=native.available)}
