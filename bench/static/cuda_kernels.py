"""What the CUDA kernels do, where their machine code does not say it: one entry for each kernel of `csrc/cuda`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import sass
from .metrics import Work

N = K = 4096  # the weight that rooflines are stated for
BITS = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass(frozen=True)
class Fact:
    """marker: a pattern of opcodes that only the main loop is full of; weights: 4-bit weights that a thread decodes for
    each of them in it, so that unrolling changes nothing. dynamic_shared: bytes that the launch adds."""

    op: str
    marker: str | None = None
    weights: float = 0.0
    threads: int = 256
    dynamic_shared: int = 0
    tile: tuple[int, int, int] | None = None
    bytes: float = 0.0
    fmas: float = 0.0
    wide: bool = True
    config: dict[str, Any] = field(default_factory=dict)

    def work(self, code: sass.Kernel) -> Work:
        marked = sum(bool(re.match(self.marker, sass.opcode(i))) for i in code.loop) if self.marker else 0
        threads = code.threads or self.threads
        return Work(weights=self.weights * marked * threads, tile=self.tile, bytes=self.bytes, fmas=self.fmas,
                    wide=self.wide)  # fmt: skip


def _dequantize(arguments: tuple[str, ...]) -> Fact:
    size = BITS[arguments[0]]
    packed = N * K * (0.5 + 1 / 64 + 4 / 64 / 256)
    return Fact("dequantize_4bit", r"STG\.E\.(\w+\.)*128", 16 / size, bytes=packed + N * K * size, wide=False)


FACTS: dict[str, Callable[[tuple[str, ...]], Fact]] = {
    "dequantize_kernel": _dequantize,
    "quantize_kernel": lambda arguments: Fact("quantize_4bit", wide=False),
    "absmax_kernel": lambda arguments: Fact("quantize_4bit", wide=False),
}


def fact(name: str, arguments: tuple[str, ...]) -> Fact | None:
    """None for a kernel that is not described: the report then says so, and the tests fail."""
    return FACTS[name](arguments) if name in FACTS else None
