"""Cosines and sines of rotary embeddings, in the form that this project's kernels and few torch calls take."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .description import Attention


class Turn(NamedTuple):
    """cos, sin: [B or 1, T, R], of features as they lie; neighbours: features 2 i and 2 i + 1 are a pair."""

    cos: Tensor
    sin: Tensor
    neighbours: bool


class Angles:
    """`Turn`s of the last cosines: a model's layers share them, and a model with windows may have two kinds."""

    def __init__(self) -> None:
        self._made: tuple[tuple[Tensor, bool, Turn], ...] = ()  # of these sines; whole, as threads share it

    def get(self, of: Attention, cos: Tensor, sin: Tensor) -> Turn:
        neighbours = of.turn == "neighbours"
        for kept, way, turn in self._made:
            if kept is sin and way is neighbours:
                return turn
        turn = _made(of, cos.detach(), sin.detach(), neighbours)
        self._made = (*self._made[-1:], (sin, neighbours, turn))
        return turn


def _made(of: Attention, cos: Tensor, sin: Tensor, neighbours: bool) -> Turn:
    if of.angles == "once":
        cos, sin = (_of_pairs(t, neighbours) for t in (cos, sin))
    elif of.angles == "halves":
        cos, sin = (_of_pairs(t[..., : t.shape[-1] // 2], neighbours) for t in (cos, sin))
    return Turn(cos, sin, neighbours)


@functools.cache
def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's, a number for each head: powers of 2^(-8 / n) for n a power of two, every other one of 2n's for the rest.

    Numbers, as a tensor that is made once may be one of inference mode, or of a graph.
    """

    def powers(n: int, step: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1, step)]

    whole = 2 ** int(math.log2(heads))
    return (*powers(whole, 1), *powers(2 * whole, 2)[: heads - whole])


def _of_pairs(t: Tensor, neighbours: bool) -> Tensor:
    return t.repeat_interleave(2, dim=-1) if neighbours else torch.cat((t, t), dim=-1)
