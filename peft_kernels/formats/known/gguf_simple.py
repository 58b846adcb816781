"""GGUF's blocks of 32 with one scale, and a minimum in those of type 1: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Bytes of a block: the scale d (float16); in type 1 the minimum m (float16); in Q5 the fifth bits, of element i bit i of
32; then the codes. Byte j of 4-bit codes holds element j below and element 16 + j above.

    Q4_0: d (code - 8)    Q5_0: d (code - 16)    Q8_0: d code (int8)    Q4_1, Q5_1: d code + m, rounded twice
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gguf import bits, block_format, half_at, low_then_high


def _fifth(blocks: Tensor, byte: int) -> Tensor:
    """uint8 [n, 32]: 16 where the element's fifth bit is set."""
    return (bits(blocks[:, byte : byte + 4], range(8)).transpose(1, 2).reshape(-1, 32) & 1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * (low_then_high(blocks[:, 2:], 16).to(torch.float32) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * low_then_high(blocks[:, 4:], 16).to(torch.float32) + half_at(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = low_then_high(blocks[:, 6:], 16) | _fifth(blocks, 2)
    return half_at(blocks, 0) * (codes.to(torch.float32) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = low_then_high(blocks[:, 8:], 16) | _fifth(blocks, 4)
    return half_at(blocks, 0) * codes.to(torch.float32) + half_at(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).to(torch.float32)


FORMATS = [
    block_format("q4_0", 6, 32, 18, _q4_0, (0,)),
    block_format("q4_1", 7, 32, 20, _q4_1, (0, 2)),
    block_format("q5_0", 8, 32, 22, _q5_0, (0,)),
    block_format("q5_1", 9, 32, 24, _q5_1, (0, 2)),
    block_format("q8_0", 10, 32, 34, _q8_0, (0,)),
]
