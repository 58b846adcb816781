"""A product with a weight by the vendor's matmul, for many rows of x: a 4-bit W is decoded in panels of a bounded size.

Two panels stand decoded at once: while one is multiplied, the next is decoded on a second stream. What that needs of
events is all here:

- a decode starts behind what the caller's stream has been given so far (W may be new, and the panels' memory was used
  before), and behind the product that read its panel's memory last;
- a product starts behind the decode of its panel. So when the last product is done every decode is, and what comes on
  the caller's stream, W freed or written to, comes behind them. Hence no `record_stream`: memory is allocated, used
  last and freed in the order of the caller's stream. An error joins the streams, too.

While a CUDA graph is captured the same events fork and join the capture. Nothing is allocated on the second stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import tuning

STEP = 64  # panels start at multiples of it
Decode = Callable[[range, Tensor], Tensor]  # (rows or columns of W, memory) -> these, in x's dtype


class Weight(Protocol):
    """A weight [N, K] as `multiply` needs it."""

    shape: tuple[int, int]
    dense: bool

    def whole(self) -> Tensor:
        """A dense one, in x's dtype."""

    def decoder(self, by_rows: bool, most: int) -> tuple[Decode, int]:
        """(decode, step): what decodes rows, or columns, and where it can begin: at multiples of `step`. most: of them
        in a panel."""


@dataclass(frozen=True)
class Streams:
    """The caller's stream and the one for decoding."""

    main: Any  # torch.cuda.Stream, or what a test has in its place
    side: Any

    def on_side(self) -> contextlib.AbstractContextManager[Any]:
        """Within, the second stream is torch's current one."""
        return torch.cuda.stream(self.side)


_sides: dict[tuple[int, int], torch.cuda.Stream] = {}


def streams(device: torch.device) -> Streams | None:
    """Those of a GPU; None on a CPU, where all runs in order.

    Each stream of a caller has one of its own beside it: a capture of one must not take in another thread's work.
    """
    if device.type != "cuda":
        return None
    main = torch.cuda.current_stream(device)
    key = (device.index, main.cuda_stream)
    while (side := _sides.get(key)) is None or side == main:  # torch hands out the streams of a pool in turns
        # of a higher priority: blocks that decode take the places that blocks of the product leave
        _sides[key] = torch.cuda.Stream(device, priority=-1)
    return Streams(main, side)


def use(x: Tensor, dense: bool, arch: str, backward: bool = False) -> bool:
    """True where the product of x [M, ...] is left to the vendor's matmul. backward: that of dy."""
    p = tuning.panels(arch)
    return x.dtype is not torch.float32 and x.shape[0] >= (p.from_M_dense if dense else p.least(backward))


def multiply(
    x: Tensor, w: Weight, out: Tensor, started: bool, by_rows: bool, arch: str,
    begin: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """out (+)= x W^T, by panels of rows of W, or out (+)= x W, by panels of columns: each sum is rounded once.

    started: `out` holds what the products are added to. begin: launches what puts it there.
    """
    if w.dense:
        begin()
        add_product(out, x, w.whole().t() if by_rows else w.whole(), started)
        return
    n, k = w.shape
    total, other = (n, k) if by_rows else (k, n)
    most = tuning.panels(arch).elements // max(other, 1)
    decode, step = w.decoder(by_rows, most)
    most = min(total, max(most // step, 1) * step)
    parts = [range(first, min(first + most, total)) for first in range(0, total, max(most, 1))]
    memory = [x.new_empty((most * other,)) for _ in parts[:2]]
    beside = streams(x.device) if len(parts) > 1 else None
    panels: list[Tensor] = []
    decoded: list[Any] = []
    multiplied: list[Any] = []

    def decode_next() -> None:
        i = len(panels)
        if i >= len(parts):
            return
        if beside is None:
            panels.append(decode(parts[i], memory[i % 2]))
            return
        if i != 1:
            beside.side.wait_event(multiplied[i - 2] if i else beside.main.record_event())
        with beside.on_side():
            panels.append(decode(parts[i], memory[i % 2]))
        decoded.append(beside.side.record_event())

    try:
        decode_next()
        if beside is not None:
            decode_next()
        begin()
        for i, part in enumerate(parts):
            if beside is not None:
                beside.main.wait_event(decoded[i])
            add_product(out[:, part.start : part.stop], x, panels[i].t() if by_rows else panels[i], started)
            if beside is not None:
                multiplied.append(beside.main.record_event())
            decode_next()
    except BaseException:
        if beside is not None:
            beside.main.wait_event(beside.side.record_event())
        raise


def add_product(out: Tensor, x: Tensor, w: Tensor, started: bool) -> None:
    """out = x w, plus what it held where it was `started`."""
    out.addmm_(x, w, beta=1 if started else 0)
