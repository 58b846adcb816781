"""GGUF's blocks of 32 with one scale, and a minimum in those of type 1: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Bytes of a block: the scale d (float16); in type 1 the minimum m (float16); in Q5 the fifth bits, of element i bit i of
32; then the codes. Byte j of 4-bit codes holds element j below and element 16 + j above.

    Q4_0: d (code - 8)    Q5_0: d (code - 16)    Q8_0: d code (int8)    Q4_1, Q5_1: d code + m, rounded twice
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..gguf import bits, block_format, half_at, half_bytes, halves_packed, inverse, low_then_high


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


def _quantized(blocks: Tensor, most: int, minimums: bool) -> Tensor:
    """Blocks [n, bytes] of w [n, 32]; most: the largest code, 15 or 31. What has no minimum puts its value of the
    largest magnitude at code 0."""
    if minimums:
        least = blocks.amin(dim=1, keepdim=True)
        d = (blocks.amax(dim=1, keepdim=True) - least) / least.new_tensor(float(most))
        codes = (blocks - least) * inverse(d) + 0.5
        head = [half_bytes(d), half_bytes(least)]
    else:
        middle = (most + 1) // 2
        d = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) / -middle  # by a power of two: exact
        codes = blocks * inverse(d) + (middle + 0.5)
        head = [half_bytes(d)]
    whole = codes.clamp(0, most).to(torch.uint8)
    if most == 31:
        bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        head.append(((whole.view(-1, 4, 8) >> 4) << bit).sum(dim=2, dtype=torch.uint8))
    return torch.cat((*head, halves_packed(whole)), dim=1)


def _to_q8_0(blocks: Tensor) -> Tensor:
    d = blocks.abs().amax(dim=1, keepdim=True)
    d = d / d.new_tensor(127.0)
    scaled = blocks * inverse(d)
    size = scaled.abs().floor()  # to nearest, halves away from zero
    size = size + (2 * (scaled.abs() - size)).floor()
    return torch.cat((half_bytes(d), (scaled.sign() * size).to(torch.int8).view(torch.uint8)), dim=1)


FORMATS = [
    block_format("q4_0", 6, 32, 18, _q4_0, (0,), partial(_quantized, most=15, minimums=False)),
    block_format("q4_1", 7, 32, 20, _q4_1, (0, 2), partial(_quantized, most=15, minimums=True)),
    block_format("q5_0", 8, 32, 22, _q5_0, (0,), partial(_quantized, most=31, minimums=False)),
    block_format("q5_1", 9, 32, 24, _q5_1, (0, 2), partial(_quantized, most=31, minimums=True)),
    block_format("q8_0", 10, 32, 34, _q8_0, (0,), _to_q8_0),
]
