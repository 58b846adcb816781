"""NF4 and FP4: 16 values and a scale per block, as QLoRA (arXiv 2305.14314) and bitsandbytes' `Params4bit` store them.

A weight of any shape is read flat in row-major order, two codes a byte, the **high** nibble holding the even element.
Every `blocksize` elements share a scale `absmax`. With nested (double) quantisation `absmax` itself is stored as
uint8 codes into the 256-entry float32 map `nested_code`, with a float32 scale per `nested_blocksize` codes and one
`offset`. The decoded value is by definition the float32 product `table[code] * absmax`, rounded once.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ...checks import arg_error
from ..format import Format, Parts, Shape, nibbles, not_finite
from ..tables import QUANT_TYPES, table

BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def decode_absmax(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    """float32 scale per block, [nblocks]; the identity where `absmax` is not nested."""
    if nested_absmax is None:
        return absmax.reshape(-1)
    assert nested_code is not None
    assert offset is not None
    codes = absmax.reshape(-1)
    scale = nested_absmax.reshape(-1)[torch.arange(codes.numel(), device=codes.device) // nested_blocksize]
    return nested_code.reshape(-1)[codes.long()] * scale + offset.reshape(())


def _decode(number: int, parts: Parts, shape: Shape) -> Tensor:
    assert parts.absmax is not None
    numel = math.prod(shape)
    codes = nibbles(parts.packed)[:numel].long()
    scale = decode_absmax(parts.absmax, parts.nested_absmax, parts.nested_code, parts.offset, parts.nested_blocksize)
    scale = scale.repeat_interleave(parts.blocksize)[:numel]
    return (table(number, parts.packed.device)[codes] * scale).reshape(tuple(shape))


def _check(
    op: str, packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, blocksize: int, nested_blocksize: int, shape: Shape, name: str,
) -> None:  # fmt: skip
    if blocksize not in BLOCKSIZES:
        raise arg_error(op, "blocksize", f"one of {BLOCKSIZES}", blocksize)
    numel = math.prod(shape)
    if packed.numel() != (numel + 1) // 2:
        raise arg_error(op, name, f"{(numel + 1) // 2} bytes for shape {tuple(shape)}", packed.numel())
    nblocks = -(-numel // blocksize)
    if absmax is None or absmax.numel() != nblocks:
        raise arg_error(op, "absmax", f"{nblocks} scales for shape {tuple(shape)} at blocksize {blocksize}",
                        "None" if absmax is None else absmax.numel())  # fmt: skip
    if nested_absmax is None:
        if absmax.dtype is not torch.float32:
            raise arg_error(op, "absmax", "float32 when it is not nested", absmax.dtype, TypeError)
        return
    if absmax.dtype is not torch.uint8:
        raise arg_error(op, "absmax", "uint8 codes when nested", absmax.dtype, TypeError)
    if nested_blocksize < 1:
        raise arg_error(op, "nested_blocksize", "positive", nested_blocksize)
    for part, t, size in (("nested_absmax", nested_absmax, -(-nblocks // nested_blocksize)),
                          ("nested_code", nested_code, 256), ("offset", offset, 1)):  # fmt: skip
        if t is None or t.numel() != size:
            raise arg_error(op, part, f"{size} float32 values", "None" if t is None else t.numel())
        if t.dtype is not torch.float32:
            raise arg_error(op, part, "float32", t.dtype, TypeError)


def _wrong(parts: Parts, _: Shape) -> str | None:
    return not_finite(absmax=parts.absmax, nested_absmax=parts.nested_absmax, nested_code=parts.nested_code,
                      offset=parts.offset)  # fmt: skip


def _quantize(number: int, w: Tensor, blocksize: int | None) -> Parts:
    blocksize = 64 if blocksize is None else blocksize
    # by its registered name: the operator's module imports this one
    packed, absmax, *_ = torch.ops.peft_kernels.quantize_4bit(w, number, blocksize, False, 256)
    return Parts(packed, absmax, None, None, None, blocksize, 256)


FORMATS = [Format(name, number, _check, partial(_decode, number), _wrong, partial(_quantize, number))
           for name, number in QUANT_TYPES.items()]  # fmt: skip
