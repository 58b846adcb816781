"""GGUF's K-quants: blocks of 256, each of groups whose scales are small integers times the block's.

Q4_K and Q5_K: d and dmin (float16), then 12 bytes of eight 6-bit scales and eight 6-bit minimums, in Q5_K 32 bytes of
fifth bits (of element 32 g + i bit g of byte i), then 128 bytes of codes: of each 32 bytes the low nibbles are a group
of 32 elements, the high ones the next.

    value = (d scale) code - (dmin minimum)

Q6_K: 128 bytes of the low four bits of codes, 64 of the upper two, 16 scales (int8), d (float16).

    value = (d scale) (code - 32)

Every product, difference and sum is rounded to float32 once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gguf import bits, block_format, half_at, low_then_high


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, minimums), float32 [n, 8, 1], each times the block's own."""
    first, second, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (mixed & 15) | ((first >> 2) & 48)), dim=1).to(torch.float32)
    minimums = torch.cat((second & 63, (mixed >> 4) | ((second >> 2) & 48)), dim=1).to(torch.float32)
    return (half_at(blocks, 0) * scales).unsqueeze(2), (half_at(blocks, 2) * minimums).unsqueeze(2)


def _with_minimums(blocks: Tensor, codes: Tensor) -> Tensor:
    scales, minimums = _six_bits(blocks)
    return (scales * codes.reshape(-1, 8, 32).to(torch.float32) - minimums).reshape(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minimums(blocks, low_then_high(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    fifth = (bits(blocks[:, 16:48], range(8)) & 1) << 4
    return _with_minimums(blocks, low_then_high(blocks[:, 48:], 32) | fifth.reshape(-1, 256))


def _q6_k(blocks: Tensor) -> Tensor:
    upper = bits(blocks[:, 128:192].reshape(-1, 32), range(0, 8, 2)).reshape(-1, 256) & 3
    codes = low_then_high(blocks[:, :128], 64) | (upper << 4)
    scales = half_at(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    return (scales.unsqueeze(2) * (codes.reshape(-1, 16, 16).to(torch.float32) - 32)).reshape(-1, 256)


FORMATS = [
    block_format("q4_k", 11, 256, 144, _q4_k, (0, 2)),
    block_format("q5_k", 12, 256, 176, _q5_k, (0, 2)),
    block_format("q6_k", 13, 256, 210, _q6_k, (208,)),
]
