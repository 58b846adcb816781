"""Rows of a stack handed out in blocks of 8, 16, 32 ... rows: buddy allocation, by powers of two at aligned starts.

Adapters of one rank take and leave blocks of one size, which never fragments. A larger adapter finds room by evicting
what lies in one aligned region (`victims`), instead of moving adapters, which forwards may be reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SMALLEST = 8


def block_size(rank: int) -> int:
    """The rows of the block that holds an adapter of `rank`: 8, 16, 32, 64 ..."""
    return max(SMALLEST, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class Occupant:
    """A block in use. key: who has it. used: when it was used last, on any increasing scale. free: may be evicted."""

    key: int
    start: int
    size: int
    used: int
    free: bool


def least_recent(occupants: Iterable[Occupant]) -> list[int] | None:
    """The key of the one that was used longest ago and may be evicted, alone in a list; None if all must stay."""
    free = [o for o in occupants if o.free]
    return [min(free, key=lambda o: o.used).key] if free else None


class RowBlocks:
    """The blocks of `rows` rows, of which the last `rows % 8` are left over."""

    def __init__(self, rows: int) -> None:
        self.rows = rows // SMALLEST * SMALLEST
        self._free: dict[int, set[int]] = {}
        self._taken: dict[int, int] = {}
        start = 0
        while start < self.rows:  # the largest block first, so that each starts at a multiple of its size
            size = 1 << (self.rows - start).bit_length() - 1
            self._free.setdefault(size, set()).add(start)
            start += size

    @property
    def taken(self) -> int:
        """Rows of blocks in use."""
        return sum(self._taken.values())

    def take(self, size: int) -> int | None:
        """The start of a free block of `size` rows (a `block_size`), now in use; None if there is none."""
        fitting = [s for s, starts in self._free.items() if s >= size and starts]
        if not fitting:
            return None
        found = min(fitting)
        start = min(self._free[found])
        self._free[found].remove(start)
        while found > size:
            found //= 2
            self._free.setdefault(found, set()).add(start + found)
        self._taken[start] = size
        return start

    def give(self, start: int) -> None:
        """Free a block; it joins its free neighbours."""
        size = self._taken.pop(start)
        while start ^ size in self._free.get(size, ()):
            self._free[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self._free.setdefault(size, set()).add(start)

    def victims(self, size: int, occupants: Iterable[Occupant]) -> list[int] | None:
        """Whom to evict for a block of `size` rows: the keys of all in the region whose latest use is the oldest.

        Among blocks of one size that is the least recently used one. None if every region holds one that must stay, or
        there is no region so large.
        """
        count = self.rows // size
        latest = [-1] * count
        inside: list[list[int]] = [[] for _ in range(count)]
        blocked = [False] * count
        for o in occupants:
            for region in range(o.start // size, min(count, (o.start + o.size - 1) // size + 1)):
                latest[region] = max(latest[region], o.used)
                inside[region].append(o.key)
                blocked[region] |= not o.free
        choices = [region for region in range(count) if not blocked[region]]
        return inside[min(choices, key=lambda region: latest[region])] if choices else None
