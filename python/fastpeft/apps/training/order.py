"""The order in which a run uses its examples: shuffled, files mixed by their weights, and never in memory as a whole.

Everything here is a pure function of counts, weights and seed, so that a resumed run goes on in it exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

BLOCK = 16_384  # examples that are shuffled among each other, and in memory, at a time

Part = tuple[int, float | None]  # a file's examples, and its weight; None: as many as it has


class Order:
    """Indices of examples that lie one file after the other, by epoch and block.

    An epoch has as many examples as there are. A file's share of them is its weight over the sum of weights, in every
    block to within one example; so lines of a heavy file come again within an epoch, and of a light one some in each.
    A file is gone through once before any of its lines comes again, from where the epoch before stopped. In a block all
    are shuffled. More than `BLOCK` examples are blocks of equal size, each of lines from all over the files.
    """

    def __init__(self, parts: Sequence[Part], seed: int) -> None:
        self.total = sum(count for count, _ in parts)
        self.blocks = max(1, math.ceil(self.total / BLOCK))
        self._seed = seed
        weights = [Fraction(count if weight is None else weight) for count, weight in parts]
        self._parts = [(count, weight / sum(weights)) for (count, _), weight in zip(parts, weights, strict=True)]

    def block(self, epoch: int, number: int) -> list[int]:
        """The examples of a block, in order; one may be in it several times."""
        first, last = (epoch * self.total + self.total * n // self.blocks for n in (number, number + 1))
        found: list[int] = []
        before = 0
        for part, (count, share) in enumerate(self._parts):
            found += (before + i for i in self._lines(part, math.floor(share * first), math.floor(share * last)))
            before += count
        found.sort()  # what is read in the order of the file is read quickest
        random.Random(self.key(epoch, number)).shuffle(found)
        return found

    def in_epoch(self, part: int) -> float:
        """How often an epoch takes a line of a file."""
        count, share = self._parts[part]
        return float(share * self.total / count)

    def key(self, epoch: int, number: int) -> str:
        """The seed of what is drawn for a block."""
        return f"{self._seed}/{epoch}" + (f"/{number}" if number else "")

    def _lines(self, part: int, first: int, last: int) -> Iterator[int]:
        """The lines of a file's endless stream: each pass through it begins elsewhere and goes on in strides of the
        golden section, so that any stretch of it is spread evenly over the file."""
        count = self._parts[part][0]
        stride = max(1, round(count * 0.6180339887))
        while math.gcd(stride, count) != 1:
            stride += 1
        begin, drawn = 0, -1
        for at in range(first, last):
            if at // count != drawn:
                drawn = at // count
                begin = random.Random(f"{self._seed}/{part}/{drawn}").randrange(count)
            yield (begin + at * stride) % count
