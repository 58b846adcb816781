"""GGUF's blocks of 32 codes into a table: IQ4_NL, with a float16 scale, and MXFP4, with a power of two.

Bytes of a block: the scale, two or one; then 16 bytes of codes, byte j of element j below and 16 + j above. The scale
of MXFP4 is 2^(e - 128) for its byte e (2^-128 for 0): half of what the microscaling format says, as its values are
doubled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gguf import block_format, half_at, halves_packed, low_then_high
from ..tables import IQ4_NL, MXFP4, table


def _values(number: int, blocks: Tensor, byte: int) -> Tensor:
    return table(number, blocks.device)[low_then_high(blocks[:, byte:], 16).long()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * _values(IQ4_NL, blocks, 2)


def powers(exponents: Tensor) -> Tensor:
    """2^(e - 128) as float32 of uint8 exponents; of 0 and 1 it is subnormal."""
    e = exponents.to(torch.int32)
    return torch.where(e < 2, (e + 1) << 21, (e - 1) << 23).view(torch.float32)


def _mxfp4(blocks: Tensor) -> Tensor:
    return powers(blocks[:, :1].contiguous()) * _values(MXFP4, blocks, 1)


def _to_mxfp4(blocks: Tensor) -> Tensor:
    """The nearest value, of two as near the smaller. Exponents are at least 0: those of weights below 2^-124 wrap
    around in the owner's code, whose values are zero for them."""
    most = blocks.abs().amax(dim=1, keepdim=True)
    e = most.to(torch.float64).log2().to(torch.float32).floor() + 125
    e = torch.where(most > 0, e, 0.0).clamp(min=0).to(torch.uint8)
    size = blocks.abs() / powers(e)
    between = blocks.new_tensor((0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0))
    codes = torch.bucketize(size, between).to(torch.uint8)  # a size on the line takes the smaller code
    codes = torch.where((blocks < 0) & (codes > 0), codes + 8, codes)
    return torch.cat((e, halves_packed(codes)), dim=1)


FORMATS = [
    block_format("iq4_nl", IQ4_NL, 32, 18, _iq4_nl, (0,)),
    block_format("mxfp4", MXFP4, 32, 17, _mxfp4, (), _to_mxfp4),  # every byte is a finite scale
]
