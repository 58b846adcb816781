"""Rows and batches: how examples are laid out for the model, the same for the same seed.

A packed row holds several examples one after the other. Position ids start at 0 for each, and without an attention mask
transformers derives from them that no token attends across examples (for sdpa and eager as a mask, for flash attention
as sequence lengths). `forward.self_check` holds the model at hand to that before training.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .data import Corpus, Example
from .errors import UserError
from .order import BLOCK, Order

if TYPE_CHECKING:
    import torch

_OPEN_ROWS = 64  # rows that wait for a fitting example: enough to fill them to about 97 %

Row = list[int]  # indices of the examples in one row


@dataclass(frozen=True)
class Batch:
    """One forward pass. ``where`` are flat positions whose hidden state predicts ``targets``."""

    input_ids: torch.Tensor  # [rows, length] int64
    position_ids: torch.Tensor  # [rows, length] int64
    where: torch.Tensor  # [learned] int64, positions in the flattened rows
    targets: torch.Tensor  # [learned] int64
    tokens: int  # without padding

    def to(self, device: torch.device) -> Batch:
        ids, positions, where, targets = (
            t.to(device, non_blocking=True) for t in (self.input_ids, self.position_ids, self.where, self.targets)
        )
        return Batch(ids, positions, where, targets, self.tokens)


def lay_out(order: Iterable[int], length: Callable[[int], int], key: str, max_length: int, packing: bool) -> list[Row]:
    """Lay examples into rows, in their order; those of length 0 are left out.

    With packing, first fit over a bounded number of open rows. key: the seed of the rows' order.
    """
    if not packing:
        return [[i] for i in order if length(i)]
    done: list[Row] = []
    opened: list[tuple[int, Row]] = []  # (free tokens, row)
    for i in order:
        tokens = length(i)
        if not tokens:
            continue
        for slot, (free, row) in enumerate(opened):
            if tokens <= free:
                row.append(i)
                opened[slot] = (free - tokens, row)
                break
        else:
            if len(opened) == _OPEN_ROWS:
                fullest = min(range(len(opened)), key=lambda s: opened[s][0])
                done.append(opened.pop(fullest)[1])
            opened.append((max_length - tokens, [i]))
    rows = done + [row for _, row in opened]
    random.Random(f"{key}/rows").shuffle(rows)  # the rows closed last are the emptiest: spread them
    return rows


class Place(NamedTuple):
    """A position between two steps: the next begins with this row of this block, or those after it."""

    epoch: int = 0
    block: int = 0
    row: int = 0


class Plan:
    """Which rows each step uses: a pure function of examples, seed and layout.

    A block of examples is laid out when a step needs it, so steps are quickest taken one after the other. There are as
    many as `max_steps` says, or as ``epochs`` gives: counted where all examples are one block, else estimated by the
    first, which is drawn from all of them (`about`). in_epoch: the steps of an epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example | None],
        *,
        seed: int,
        max_length: int,
        packing: bool,
        batch_size: int,
        gradient_accumulation: int,
        epochs: float,
        max_steps: int,
    ) -> None:
        self.examples = Corpus.of(examples)
        self._order = Order(self.examples.parts, seed)
        self._max_length, self._packing = max_length, packing
        self._batch_size, self._accumulation = batch_size, gradient_accumulation
        self._laid_out: tuple[tuple[int, int], list[Row]] | None = None
        self._next, self._last = (0, Place()), (-1, (0, list[Row]()))
        self.about = self._order.blocks > 1
        first = self._rows(0, 0)
        if not first:
            raise UserError(f"no example is left of {len(self.examples)}", "raise max_length")
        digest = hashlib.sha256(repr((seed, max_length, packing, batch_size, gradient_accumulation)).encode())
        if len(self.examples.parts) > 1:
            digest.update(repr(self.examples.parts).encode())
        digest.update(self.examples.digest.encode())
        for i in sorted(self._order.block(0, 0)) if self.examples.digest else range(len(self.examples)):
            if (example := self.examples[i]) is not None:
                digest.update(repr((example.input_ids, example.learn)).encode())
        self.fingerprint = digest.hexdigest()
        self.in_epoch = math.ceil(round(len(first) * self._order.blocks) / (batch_size * gradient_accumulation))
        self._count = max_steps or self._steps_of(epochs)

    def _steps_of(self, epochs: float) -> int:
        if self.about:
            return max(1, round(epochs * self.in_epoch))
        steps = 0
        for epoch in range(math.ceil(epochs)):
            whole = math.ceil(len(self._rows(epoch, 0)) / (self._batch_size * self._accumulation))
            steps += round(min(1.0, epochs - epoch) * whole) or (0 if steps else 1)
        return steps

    def _rows(self, epoch: int, block: int) -> list[Row]:
        """The rows of a block; the last one's are kept."""
        if self._laid_out is None or self._laid_out[0] != (epoch, block):
            order = self._order.block(epoch, block)
            self.examples.load(order)
            key = self._order.key(epoch, block)
            self._laid_out = (epoch, block), lay_out(order, self._length, key, self._max_length, self._packing)
        return self._laid_out[1]

    def _length(self, index: int) -> int:
        example = self.examples[index]
        return 0 if example is None else len(example)

    def _take(self, place: Place) -> tuple[tuple[int, list[Row]], Place]:
        """(epoch, rows) of the step that begins at a place, and the place after it. A step ends with its epoch."""
        epoch, block, row = place
        missing = self._batch_size * self._accumulation
        taken: list[Row] = []
        while True:
            rows = self._rows(epoch, block)[row : row + missing - len(taken)]
            taken += rows
            row += len(rows)
            if len(taken) == missing:
                break
            block, row = block + 1, 0
            if block == self._order.blocks:
                if taken:
                    return (epoch, taken), Place(epoch + 1)
                epoch, block = epoch + 1, 0
        return (epoch, taken), Place(epoch, block, row)

    def step(self, number: int) -> tuple[int, list[list[Row]]]:
        """(epoch, forward passes of rows of indices) of a step, from 0."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number != self._last[0]:
            taken, after = self._take(self.place(number))
            self._next, self._last = (number + 1, after), (number, taken)
        epoch, rows = self._last[1]
        passes = [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
        return epoch, passes

    def place(self, number: int) -> Place:
        """Where a step begins."""
        at, place = self._next if self._next[0] <= number else (0, Place())
        while at < number:
            at, place = at + 1, self._take(place)[1]
        self._next = at, place
        return place

    def go_to(self, number: int, place: Sequence[int]) -> None:
        """Take it that this step begins at a place that `place` gave."""
        self._next = number, Place(*place)

    @property
    def steps(self) -> Iterator[tuple[int, list[list[Row]]]]:
        """All steps, one after the other."""
        return map(self.step, range(len(self)))

    @property
    def epochs(self) -> int:
        """How many epochs are begun; by estimate where the number of steps is one."""
        return math.ceil(len(self) / self.in_epoch) if self.about else self.step(len(self) - 1)[0] + 1

    def __len__(self) -> int:
        return self._count


def collate(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Lay rows of examples into one batch, padded at the end; padding counts as one more example that nobody reads."""
    import torch

    length = max(sum(len(e) for e in row) for row in rows)
    ids, positions, where, targets = [], [], [], []
    tokens = 0
    packed = any(len(row) > 1 for row in rows)
    for number, row in enumerate(rows):
        row_ids: list[int] = []
        row_positions: list[int] = []
        for example in row:
            first = number * length + len(row_ids)
            for i in range(1, len(example)):
                if example.learn[i]:
                    where.append(first + i - 1)
                    targets.append(example.input_ids[i])
            row_ids += example.input_ids
            row_positions += range(len(example))
        tokens += len(row_ids)
        padding = length - len(row_ids)
        ids.append(row_ids + [pad_id] * padding)
        # An unpacked row just counts on: restarting would cost it the maskless causal attention.
        positions.append(row_positions + list(range(padding)) if packed else list(range(length)))
    return Batch(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(where, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long), tokens,
    )  # fmt: skip


class HeldOut:
    """Batches over all examples in a fixed order: by length, so that rows without packing need little padding.

    Those of one block are kept; of more, each pass over them makes them anew.
    """

    def __init__(
        self, examples: Sequence[Example | None], max_length: int, batch_size: int, packing: bool, pad_id: int
    ) -> None:
        self._examples, self._max_length, self._packing = Corpus.of(examples), max_length, packing
        self._batch_size, self._pad_id = batch_size, pad_id
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            return iter(self._kept)
        count = len(self._examples)
        made = (b for first in range(0, count, BLOCK) for b in self._block(range(first, min(count, first + BLOCK))))
        if count > BLOCK:
            return made
        self._kept = list(made)
        return iter(self._kept)

    def _block(self, indices: range) -> Iterator[Batch]:
        self._examples.load(indices)
        found = {i: example for i in indices if (example := self._examples[i]) is not None}
        if self._packing:
            order = (indices[i] for i in Order([(len(indices), None)], 0).block(0, 0))
            lengths = {i: len(example) for i, example in found.items()}
            rows = lay_out(order, lambda i: lengths.get(i, 0), "0/0", self._max_length, True)
        else:
            rows = [[i] for i in sorted(found, key=lambda i: (len(found[i]), i))]
        for first in range(0, len(rows), self._batch_size):
            yield collate([[found[i] for i in row] for row in rows[first : first + self._batch_size]], self._pad_id)
