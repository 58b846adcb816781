"""Rows and batches: how examples are laid out for the model, the same for the same seed.

A packed row holds several examples one after the other. Position ids start at 0 for each, and without an attention mask
transformers derives from them that no token attends across examples (for sdpa and eager as a mask, for flash attention
as sequence lengths). `forward.self_check` holds the model at hand to that before training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .data import Example

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


def rows_of_epoch(lengths: Sequence[int], epoch: int, seed: int, max_length: int, packing: bool) -> list[Row]:
    """Shuffle the examples and lay them into rows. With packing, first fit over a bounded number of open rows."""
    order = list(range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    if not packing:
        return [[i] for i in order]
    done: list[Row] = []
    opened: list[tuple[int, Row]] = []  # (free tokens, row)
    for i in order:
        length = lengths[i]
        for slot, (free, row) in enumerate(opened):
            if length <= free:
                row.append(i)
                opened[slot] = (free - length, row)
                break
        else:
            if len(opened) == _OPEN_ROWS:
                fullest = min(range(len(opened)), key=lambda s: opened[s][0])
                done.append(opened.pop(fullest)[1])
            opened.append((max_length - length, [i]))
    rows = done + [row for _, row in opened]
    random.Random(f"{seed}/{epoch}/rows").shuffle(rows)  # the rows closed last are the emptiest: spread them
    return rows


class Plan:
    """Which rows each step uses: a pure function of lengths, seed and layout, so a step number is a position."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        seed: int,
        max_length: int,
        packing: bool,
        batch_size: int,
        gradient_accumulation: int,
        epochs: float,
        max_steps: int,
    ) -> None:
        self._lengths = [len(e) for e in examples]
        self._seed, self._max_length, self._packing = seed, max_length, packing
        self._batch_size, self._accumulation = batch_size, gradient_accumulation
        self.steps: list[tuple[int, list[list[Row]]]] = []  # (epoch, forward passes of rows)
        epoch = 0
        while True:
            per_epoch = self._epoch(epoch)
            if max_steps:
                missing = max_steps - len(self.steps)
            else:
                missing = round(min(1.0, epochs - epoch) * len(per_epoch)) or (1 if not self.steps else 0)
            self.steps += [(epoch, step) for step in per_epoch[:missing]]
            epoch += 1
            if len(self.steps) >= max_steps if max_steps else epoch >= epochs:
                break
        digest = hashlib.sha256(repr((seed, max_length, packing, batch_size, gradient_accumulation)).encode())
        for example in examples:
            digest.update(repr((example.input_ids, example.learn)).encode())
        self.fingerprint = digest.hexdigest()

    def _epoch(self, epoch: int) -> list[list[list[Row]]]:
        rows = rows_of_epoch(self._lengths, epoch, self._seed, self._max_length, self._packing)
        passes = [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
        return [passes[i : i + self._accumulation] for i in range(0, len(passes), self._accumulation)]

    def __len__(self) -> int:
        return len(self.steps)


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


def eval_batches(
    examples: Sequence[Example], max_length: int, batch_size: int, packing: bool, pad_id: int
) -> list[Batch]:
    """Batches over all examples in a fixed order: by length, so that rows without packing need little padding."""
    if packing:
        rows = rows_of_epoch([len(e) for e in examples], 0, 0, max_length, True)
    else:
        rows = [[i] for i in sorted(range(len(examples)), key=lambda i: (len(examples[i]), i))]
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [collate([[examples[i] for i in row] for row in group], pad_id) for group in groups]
