"""quantize_4bit on Triton."""

from __future__ import annotations

from torch import Tensor

from ...triton_lib import host
from . import levels, nested_parts, no_nesting, outputs

ELEMENTS = 4096  # per program: one block of the largest blocksize, 128 of the smallest


def quantize_4bit(
    w: Tensor, quant_type: int, blocksize: int, nested: bool, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton_kernels import absmax_kernel, quantize_kernel

    w = w.contiguous()
    packed, absmax = outputs(w, blocksize)
    host.launch(
        quantize_kernel, (-(-w.numel() // ELEMENTS),), w, levels.on_device("midpoints", quant_type, w.device),
        levels.on_device("order", quant_type, w.device), packed, absmax, w.numel(),
        IN_ORDER=levels.order(quant_type) == tuple(range(16)), BLOCKSIZE=blocksize, BLOCKS=ELEMENTS // blocksize,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    if not nested:
        return packed, absmax, *no_nesting(w)
    codes, nested_absmax, nested_code, offset = nested_parts(absmax, nested_blocksize)
    host.launch(
        absmax_kernel, (nested_absmax.numel(),), absmax, offset, levels.on_device("nested_rounding", 0, w.device),
        codes, nested_absmax, absmax.numel(), BLOCKSIZE=nested_blocksize, num_warps=4, num_stages=1,
    )  # fmt: skip
    return packed, codes, nested_absmax, nested_code, offset


BACKENDS = host.backends({"quantize_4bit": quantize_4bit})
