"""Which adapter is in which slot of a pool, who holds it and who has to go. Nothing here locks: its caller does."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .blocks import Occupant, RowBlocks, block_size, least_recent
from .buffers import Buffers, Staged, fence, stream_waits
from .files import Signature
from .prompts import Prompt


@dataclass(eq=False)
class Resident:
    """An adapter in a slot. start, size: its block of rows; of a prompt the size is 0. used: when it was used last, as
    a number that grows. refs: leases on it. current: False once its files were changed or removed; it then goes with
    its last lease. written, last_use: fences."""

    name: str
    slot: int
    start: int
    signature: Signature
    size: int
    used: int
    written: Any
    prompt: Prompt | None = None
    refs: int = 0
    current: bool = True
    last_use: Any = None

    @property
    def tokens(self) -> int:
        """Virtual tokens of a prompt."""
        return 0 if self.prompt is None else self.prompt.tokens


@dataclass(frozen=True)
class PoolStats:
    """Counts since the pool was made, and what it holds now. Times in seconds, sizes in bytes.

    adapters: known by name. resident: in slots; in_use: of them held by leases. hits, misses: of `acquire` and
    `try_acquire` (a miss is counted once, not for every try). loads: files read; failures: that could not be read.
    in_flight: being read; staged: read and not yet in a slot. load_seconds: spent reading, of all threads together.
    rows: of the stacks; rows_taken: in blocks of adapters. row_bytes: of one row in all layers. virtual_tokens: that
    prompts in slots may have; virtual_tokens_taken: that they have. nbytes: of the stacks and of the keys and values of
    prompts in slots, also while these are vectors.
    """

    adapters: int
    max_resident: int
    resident: int
    in_use: int
    pinned: int
    hits: int
    misses: int
    evictions: int
    loads: int
    failures: int
    in_flight: int
    staged: int
    waiting: int
    load_seconds: float
    rows: int
    rows_taken: int
    row_bytes: int
    virtual_tokens: int
    virtual_tokens_taken: int
    nbytes: int


class Slots:
    """The slots of the stacks. `current` has the residents that a name means now; others may still be held. tokens:
    virtual tokens that prompts may have together."""

    def __init__(self, buffers: Buffers, count: int, tokens: int) -> None:
        self._buffers, self.tokens = buffers, tokens
        self.blocks = RowBlocks(buffers.rows)
        self._free = list(range(count))
        self._residents: list[Resident | None] = [None] * count
        self._clock = 0
        self.current: dict[str, Resident] = {}
        self.pinned: set[str] = set()
        self.evictions = 0

    def __iter__(self) -> Iterator[Resident]:
        return (r for r in self._residents if r is not None)

    def is_free(self, resident: Resident) -> bool:
        """True if it may be evicted."""
        return resident.refs == 0 and resident.name not in self.pinned

    def why_full(self) -> str:
        stay = sum(not self.is_free(r) for r in self)
        return (
            f"{stay} of {len(self._residents)} slots are in use or pinned, {self.blocks.taken} of {self.blocks.rows} "
            f"rows and {self.tokens_taken} of {self.tokens} virtual tokens are taken"
        )

    @property
    def tokens_taken(self) -> int:
        return sum(r.tokens for r in self)

    def hold(self, resident: Resident) -> None:
        """Count one more user, whose stream's next work begins after the copy into the slot."""
        resident.refs += 1
        self._touch(resident)
        stream_waits([resident.written], self._buffers.device)

    def let_go(self, resident: Resident) -> bool:
        """Count one user less; whether it was the last."""
        resident.refs -= 1
        resident.last_use = fence(self._buffers.device)
        self._touch(resident)
        if resident.refs == 0 and not resident.current:
            self._drop(resident)
        return resident.refs == 0

    def _touch(self, resident: Resident) -> None:
        self._clock += 1
        resident.used = self._clock

    def place(self, name: str, signature: Signature, staged: Staged | Prompt) -> Resident | None:
        """Put an adapter into a slot, evicting who must go; None if too many of them must stay."""
        if isinstance(staged, Prompt):
            if not self._make_room_for_prompt(staged.tokens):
                return None
            slot = heapq.heappop(self._free)
            resident = Resident(name, slot, 0, signature, 0, self._clock, None, staged)
            self._residents[slot] = self.current[name] = resident
            return resident
        size = block_size(staged.rank)
        start = self.blocks.take(size)
        if start is None or not self._free:
            occupants = self._occupants()
            victims = self.blocks.victims(size, occupants) if start is None else least_recent(occupants)
            if victims is None:
                if start is not None:
                    self.blocks.give(start)
                return None
            self._evict(victims)
            start = self.blocks.take(size) if start is None else start
        assert start is not None
        slot = heapq.heappop(self._free)
        try:
            written = self._buffers.write(slot, start, staged)
        except BaseException:
            self._free_slot(slot, start, size, None)
            raise
        resident = Resident(name, slot, start, signature, size, self._clock, written)
        self._residents[slot] = self.current[name] = resident
        return resident

    def _make_room_for_prompt(self, tokens: int) -> bool:
        """Evict, longest unused first, the prompts whose virtual tokens are needed, and somebody if no slot is free."""
        victims, missing = [], self.tokens_taken + tokens - self.tokens
        for r in sorted((r for r in self if r.tokens and self.is_free(r)), key=lambda r: r.used):
            if missing > 0:
                victims.append(r.slot)
                missing -= r.tokens
        if missing > 0:
            return False
        if not victims and not self._free:
            found = least_recent(self._occupants())
            if found is None:
                return False
            victims = found
        self._evict(victims)
        return True

    def _occupants(self) -> list[Occupant]:
        """Of all slots; a prompt, of size 0, is in no region of rows."""
        return [Occupant(r.slot, r.start, r.size, r.used, self.is_free(r)) for r in self]

    def _evict(self, slots: list[int]) -> None:
        for slot in slots:
            resident = self._residents[slot]
            assert resident is not None
            del self.current[resident.name]
            self._drop(resident)
            self.evictions += 1

    def forget(self, name: str) -> None:
        """Let a name mean nothing any more: what is in its slot goes, now or with its last lease."""
        resident = self.current.pop(name, None)
        if resident is not None:
            resident.current = False
            if resident.refs == 0:
                self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        self._residents[resident.slot] = None
        self._free_slot(resident.slot, resident.start, resident.size, resident.last_use)

    def _free_slot(self, slot: int, start: int, size: int, last_use: Any) -> None:
        self._buffers.clear(slot, last_use)
        if size:
            self.blocks.give(start)
        heapq.heappush(self._free, slot)
