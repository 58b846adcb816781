"""The stacked tensors of a pool: allocated once, written in place.

Layers of one width and dtype share one tensor [layers, P, width], of which each layer's `AdapterStack` has its part, so
that loading an adapter takes one copy per width instead of two per layer. All layers put an adapter into the same rows;
its rank and scaling in each are its own, and 0 where it does not act.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_kernels import AdapterStack

from ..files.checks import AdapterFileError
from ..weights.base import LayerInfo

Group = tuple[torch.dtype, int]  # of layers whose a, or b, have this dtype and width


@dataclass(frozen=True)
class LayerAdapter:
    """One adapter in one layer: A [r, K], B [N, r] and what the product is scaled by."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Staged:
    """An adapter in CPU memory, in the pool's dtype and order: what `Buffers.write` copies. rank: its largest."""

    rank: int
    rows: dict[Group, Tensor]  # [layers of the group, rank, width]
    ranks: Tensor  # int64 [layers]
    scaling: Tensor  # float32 [layers]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.rows.values())


def row_bytes(layers: Iterable[LayerInfo], dtype: torch.dtype | None) -> int:
    """The bytes of one row of a and of b in all layers."""
    return sum((info.in_features + info.out_features) * (dtype or info.dtype).itemsize for info in layers)


def slot_bytes(layers: int) -> int:
    """The bytes of a slot beside its rows: its start, and a rank and a scaling for each layer."""
    return 8 + 12 * layers


class Buffers:
    """Stacks of `slots` adapters in `rows` rows, for each layer of `layers` (by name), all on one device.

    dtype: of a and b; by default that of each layer's arithmetic. max_rank: an upper bound of ranks. device: without
    layers.
    """

    def __init__(
        self, layers: Mapping[str, LayerInfo], slots: int, rows: int, max_rank: int, dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.layers = dict(layers)
        self.rows, self.max_rank = rows, max_rank
        self.device = next((info.device for info in layers.values()), device)
        self._order = {name: i for i, name in enumerate(layers)}
        members: dict[Group, list[tuple[str, str]]] = {}
        for name, info in layers.items():
            for part, width in (("a", info.in_features), ("b", info.out_features)):
                members.setdefault((dtype or info.dtype, width), []).append((name, part))
        self._place = {part: (group, i) for group, parts in members.items() for i, part in enumerate(parts)}
        sizes = {group: len(parts) for group, parts in members.items()}
        self.row_bytes = row_bytes(layers.values(), dtype)
        # Not inference tensors, which nothing could write to later outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._groups = {
                (of, width): torch.zeros(count, rows, width, dtype=of, device=self.device)
                for (of, width), count in sizes.items()
            }
            self._starts = torch.zeros(slots, dtype=torch.int64, device=self.device)
            self._ranks = torch.zeros(len(layers), slots, dtype=torch.int64, device=self.device)
            self._scaling = torch.zeros(len(layers), slots, dtype=torch.float32, device=self.device)
            self.stacks = {name: self._stack(name) for name in layers}
        self._fences: list[Any] = []

    @property
    def nbytes(self) -> int:
        held = [*self._groups.values(), self._starts, self._ranks, self._scaling]
        return sum(t.nbytes for t in held)

    def _stack(self, name: str) -> AdapterStack:
        (a, i), (b, j), row = self._place[name, "a"], self._place[name, "b"], self._order[name]
        tensors = (self._groups[a][i], self._groups[b][j], self._starts, self._ranks[row], self._scaling[row])
        if self.device.type == "cuda":
            import torch._dynamo

            for tensor in tensors:  # a graph recorded by torch.compile then reads them where they are, uncopied
                torch._dynamo.mark_static_address(tensor, guard=False)
        return AdapterStack(*tensors, max_rank=self.max_rank)

    def stage(self, adapter: Mapping[str, LayerAdapter]) -> Staged:
        """Lay an adapter's tensors, by layer, out as they will be copied. Raises ValueError if a value overflows."""
        rank = max(part.a.shape[0] for part in adapter.values())
        pinned = self.device.type == "cuda"
        rows = {
            (of, width): torch.zeros(len(held), rank, width, dtype=of, pin_memory=pinned)
            for (of, width), held in self._groups.items()
        }
        ranks = torch.zeros(len(self._order), dtype=torch.int64, pin_memory=pinned)
        scaling = torch.zeros(len(self._order), dtype=torch.float32, pin_memory=pinned)
        for name, part in adapter.items():
            (a, i), (b, j), row, r = self._place[name, "a"], self._place[name, "b"], self._order[name], len(part.a)
            rows[a][i, :r].copy_(part.a)
            rows[b][j, :r].copy_(part.b.t())
            ranks[row], scaling[row] = r, part.scaling
        for (of, _), staged in rows.items():
            if not torch.isfinite(staged.sum(dtype=torch.float64)) and not torch.isfinite(staged).all():
                rule = f"a value is beyond the range of {of}, the pool's dtype"
                raise AdapterFileError(rule, rule)
        return Staged(rank, rows, ranks, scaling)

    def write(self, slot: int, start: int, staged: Staged) -> Any:
        """Put an adapter into rows start .. start + rank and a free slot. Returns what `wait` takes."""
        stream_waits(self._fences, self.device)
        self._fences.clear()
        with torch.no_grad():
            self._starts[slot] = start
            for group, rows in staged.rows.items():
                self._groups[group][:, start : start + staged.rank].copy_(rows, non_blocking=True)
            self._scaling[:, slot].copy_(staged.scaling, non_blocking=True)
            self._ranks[:, slot].copy_(staged.ranks, non_blocking=True)  # last: until then the slot is a free one
        return fence(self.device)

    def clear(self, slot: int, last_use: Any) -> None:
        """Make a slot a free one. last_use: the fence after its last forward."""
        if last_use is not None:
            self._fences.append(last_use)
            stream_waits([last_use], self.device)
        with torch.no_grad():
            self._ranks[:, slot] = 0


def fence(device: torch.device) -> Any:
    """A mark behind what was launched so far on this thread's stream of an accelerator; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def stream_waits(fences: list[Any], device: torch.device) -> None:
    """Let what this thread's stream gets from now on begin after the fences; the thread itself does not wait."""
    for event in fences:
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
