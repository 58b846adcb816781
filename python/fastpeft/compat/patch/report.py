"""Report of `fastpeft.patch`: which layers run on which kernel, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

from torch import nn

from ...recipes.accelerate import Acceleration
from .classes import SIDE, Side
from .stays import Stays


class Report:
    """A table, when it is printed. served: layers by (kind, adapter's method, kernel), where "torch" is our formula in
    torch's terms. stays: layers by (kind, reason) whose forward stays PEFT's. calls, ours: of PEFT's forward in patched
    layers, by reason, and those that were ours, up to now. more: of `accelerate`, where layers or loss were asked for.
    """

    def __init__(
        self, layers: Sequence[nn.Module], foreign: Iterable[nn.Module] = (), more: Acceleration | None = None
    ) -> None:
        self.more = more
        self.served: Counter[tuple[str, str, str]] = Counter()
        self.stays: Counter[tuple[str, str]] = Counter()
        self._layers = [ref(layer) for layer in layers]
        for layer in layers:
            try:
                if "forward" in layer.__dict__:  # hooks of accelerate, X-LoRA
                    raise Stays("somebody gave it another forward")
                found = layer.__dict__[SIDE].look(layer)
            except Stays as reason:
                self.stays[_kind(layer), str(reason)] += 1
                continue
            method = " + ".join(type(found.methods[n]).__name__ for n in found._active_adapter) or "none active"
            self.served[_kind(layer), method, found.kernel] += 1
        for layer in foreign:
            self.stays[_kind(layer), "a class of another package than PEFT"] += 1

    def _sides(self) -> list[Side]:
        layers = (r() for r in self._layers)
        return [layer.__dict__[SIDE] for layer in layers if layer is not None and SIDE in layer.__dict__]

    @property
    def calls(self) -> Counter[str]:
        return sum((side.calls for side in self._sides()), Counter())

    @property
    def ours(self) -> int:
        return sum(side.served for side in self._sides())

    def __str__(self) -> str:
        lines = [(str(n), kind, method, kernel) for (kind, method, kernel), n in sorted(self.served.items())]
        lines += [(str(n), kind, "", f"PEFT: {reason}") for (kind, reason), n in sorted(self.stays.items())]
        lines = [("layers", "kind", "method", "computed by"), *lines]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        rows = (f"{n:>{widths[0]}}  {kind:<{widths[1]}}  {method:<{widths[2]}}  {by}" for n, kind, method, by in lines)
        return "\n".join([*(row.rstrip() for row in rows), *([] if self.more is None else [str(self.more)])])

    __repr__ = __str__


def _kind(layer: Any) -> str:
    """A layer's class as PEFT prints it: `lora.Linear4bit`."""
    path = type(layer).__module__.split(".")
    place = path[2] if path[:2] == ["peft", "tuners"] and len(path) > 2 else ".".join(path)
    return f"{place}.{type(layer).__name__}"
