"""quantize_4bit: a tensor of any shape to NF4 or FP4 with a scale per block, bytes equal to bitsandbytes' on the CPU.

Per block of `blocksize` elements, flat row-major: absmax = max |w|, code = nearest table entry of w * (1 / absmax)
(w / absmax in a last block that is not full), all in float32. Nested: offset = mean(absmax); absmax - offset is
quantised to 8 bits in blocks of its own. Format: `formats/known/four_bit.py`; rounding:
`levels.py`. QLoRA: arXiv 2305.14314.

Blocks of zeros have absmax 0 and decode to zeros; a last, partial block has an absmax of at least 1e-38 instead. Values
that are not finite poison their block and no other: a NaN makes absmax NaN and the whole block decodes to NaN; an
infinity makes absmax infinite, and it decodes to +inf, the rest of its block to NaN. Nested, a non-finite scale makes
the offset non-finite, so the whole tensor decodes to NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import arg_error
from ...dispatch import Op
from ...formats import BLOCKSIZES, QUANT_NAMES, QUANT_TYPES, QuantWeight
from . import levels

TINY = 1e-38  # the least divisor; a float32 subnormal, whose reciprocal is still finite

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(w: Tensor, quant_type: int, blocksize: int, nested: bool, nested_blocksize: int) -> None:
    if not w.is_floating_point():
        raise arg_error("quantize_4bit", "w", "a floating-point tensor", w.dtype, TypeError)
    if quant_type not in QUANT_NAMES:
        raise arg_error("quantize_4bit", "quant_type", f"one of {QUANT_NAMES}", quant_type)
    if blocksize not in BLOCKSIZES:
        raise arg_error("quantize_4bit", "blocksize", f"one of {BLOCKSIZES}", blocksize)
    if nested_blocksize not in BLOCKSIZES:
        raise arg_error("quantize_4bit", "nested_blocksize", f"one of {BLOCKSIZES}", nested_blocksize)


def outputs(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (packed [ceil(numel / 2), 1] uint8, absmax [nblocks] float32) for `w`."""
    return (
        w.new_empty(((w.numel() + 1) // 2, 1), dtype=torch.uint8),
        w.new_empty((-(-w.numel() // blocksize),), dtype=torch.float32),
    )


def no_nesting(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stand-ins for nested_absmax, nested_code and offset where there is no nesting."""
    return tuple(w.new_empty((0,), dtype=torch.float32) for _ in range(3))  # type: ignore[return-value]


def nested_parts(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised codes and nested_absmax, then nested_code and offset, for the scales `absmax`.

    The mean is torch's on every backend: its order of sums is part of the bytes that bitsandbytes writes.
    """
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested_absmax = absmax.new_empty((-(-absmax.numel() // nested_blocksize),))
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    return codes, nested_absmax, levels.on_device("nested_map", 0, absmax.device).clone(), offset


def _fake(w: Tensor, quant_type: int, blocksize: int, nested: bool, nested_blocksize: int) -> _Outputs:
    packed, absmax = outputs(w, blocksize)
    if not nested:
        return packed, absmax, *no_nesting(w)
    nested_absmax = absmax.new_empty((-(-absmax.numel() // nested_blocksize),))
    return packed, absmax.to(torch.uint8), nested_absmax, absmax.new_empty((256,)), absmax.new_empty(())


def _reference(w: Tensor, quant_type: int, blocksize: int, nested: bool, nested_blocksize: int) -> _Outputs:
    flat = w.reshape(-1).to(torch.float32)  # float64 is rounded first: the format has no wider scale
    full = flat.numel() // blocksize * blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).reshape(-1)
    if full < flat.numel():
        last = flat[full:].abs().amax().clamp(min=TINY)
        absmax = torch.cat((absmax, last.reshape(1)))
        scaled = torch.cat((scaled, flat[full:] / last))
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))  # the spare nibble holds the code of zero
    # no clamp: what lies beyond the outermost midpoint takes the outermost code anyway
    ranks = torch.bucketize(scaled, levels.on_device("midpoints", quant_type, w.device))
    codes = levels.on_device("order", quant_type, w.device)[ranks]
    packed = ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)
    if not nested:
        return packed, absmax, *no_nesting(w)
    return packed, *_reference_nested(absmax, nested_blocksize)


def _reference_nested(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _codes, nested_absmax, nested_code, offset = nested_parts(absmax, nested_blocksize)
    n = absmax.numel()
    centred = torch.nn.functional.pad(absmax - offset, (0, -n % nested_blocksize)).view(-1, nested_blocksize)
    # NaNs are passed over here, unlike above
    nested_absmax = centred.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=1)
    scaled = (centred * (1.0 / nested_absmax).unsqueeze(1)).clamp(-1, 1)
    grid = (scaled + 1.0) * ((levels.GRID - 1) / 2) + 0.5
    # the conversion truncates; NaN (0 / 0, inf / inf) would be undefined and is code 0
    index = grid.nan_to_num(nan=0.0).to(torch.int64).reshape(-1)[:n]
    return levels.on_device("nested_rounding", 0, absmax.device)[index], nested_absmax, nested_code, offset


op = Op(
    name="quantize_4bit",
    schema=(
        "(Tensor w, int quant_type, int blocksize, bool nested, int nested_blocksize) -> "
        "(Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor nested_code, Tensor offset)"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="w[T,K]",
)


def quantize_4bit(
    w: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    nested_blocksize: int = 256,
) -> QuantWeight:
    """`w` in 4 bits: a `QuantWeight` of w's shape, device and dtype. Not differentiable; detaches.

    w: any shape, float32, bfloat16 or float16 (float64 is rounded to float32 first). quant_type: "nf4" or "fp4".
    blocksize: elements per scale, 32 to 4096, a power of two. nested: also quantise the scales to 8 bits, with a
    float32 scale per `nested_blocksize` of them. Raises ValueError or TypeError on bad arguments.
    """
    if quant_type not in QUANT_TYPES:
        raise arg_error("quantize_4bit", "quant_type", f"one of {sorted(QUANT_TYPES)}", repr(quant_type))
    packed, absmax, nested_absmax, nested_code, offset = op.op(
        w.detach(), QUANT_TYPES[quant_type], blocksize, nested, nested_blocksize
    )
    extra = (nested_absmax, nested_code, nested_blocksize, offset) if nested else (None, None, nested_blocksize, None)
    return QuantWeight(packed, absmax, tuple(w.shape), quant_type, blocksize, w.dtype, *extra)
