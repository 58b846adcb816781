"""The cost model of csrc/cuda/splits.cuh, by which a CUDA kernel's sums are split over blocks: what the static report
says of the bytes of their parts. tests/test_splits_simt.py holds both to the same choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

L2_BYTES, HAND_OVER, NEXT_KERNEL = 32, 1500, 3500  # PK_L2_BYTES a clock and SM; clocks


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def step_clocks(bm: int, bn: int, bk: int, small: bool) -> int:
    """pk_step_clocks: clocks of a step over bk of k in a tile of bm x bn."""
    return max(bn * bk // (7 if small else 28), bm * bn * bk // (256 if small else 1024))


class Split(NamedTuple):
    """parts: of each sum. apart: a kernel of its own adds them."""

    parts: int
    apart: bool


@dataclass(frozen=True)
class Sums:
    """PkSums. tiles: of the result. steps: of each sum, `step` clocks each. part: bytes of a tile's sums."""

    tiles: int
    steps: int
    step: int
    part: int

    def adding(self, split: Split, processors: int) -> int:
        """Clocks of the parts: each is written by the block that has it, and read by the one that adds."""
        n, part = split.parts, _cdiv(self.part, L2_BYTES)
        written = _cdiv(self.tiles * n, processors) * part
        if split.apart:
            return written + NEXT_KERNEL + _cdiv(self.tiles * n * part, processors)
        return 0 if n == 1 else written + HAND_OVER + _cdiv(self.tiles, processors) * n * part

    def clocks(self, split: Split, processors: int) -> int:
        """pk_split_clocks."""
        rounds = _cdiv(self.tiles * split.parts, processors)
        return rounds * (_cdiv(self.steps, split.parts) + 3) * self.step + self.adding(split, processors)

    def split(self, processors: int, apart: bool | None = None) -> Split:
        """pk_splits: the split of the fewest clocks. apart: whether a kernel of its own adds; None: either."""
        found = [Split(1, bool(apart))]
        for n in range(2, 17):
            if self.steps >= 4 * n:
                found += [Split(n, how) for how in (False, True) if apart is None or how == apart]
        return min(found, key=lambda split: self.clocks(split, processors))
