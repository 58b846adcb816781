"""The table at the top of csrc/cpu/lora/lora_linear.inc (which file serves a call), against the library's answer."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from peft_kernels import native
from peft_kernels.ops.lora_linear.native import _ARGS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "csrc" / "cpu" / "lora"
TEXT = (FOLDER / "lora_linear.inc").read_text()
HEAD = TEXT[: TEXT.index("*/")]
LEVELS = [] if native.available() else native.levels()
LANES, CHUNK = 16, int(re.findall(r"(\d+) at a time", HEAD)[0])


@dataclass(frozen=True)
class Call:
    """One projection of a forward: what the choice depends on."""

    rows: int
    level: str = "avx512"
    x: torch.dtype = torch.float32
    bits: int = 16  # of the weight: 16 for a dense one
    columns: int = 128
    blocksize: int = 64
    rank: int = 8
    adapters: int = 0  # in use, an adapter per row; 0: one for all rows
    idle: int = 0  # of rank 0, and rows without one
    by_pointer: bool = False
    dropout: float = 0.0
    gain: bool = False
    row: int = 0

    @property
    def dropped_gain(self) -> bool:
        return self.gain and self.dropout > 0 and self.rank > 0

    @property
    def chunk(self) -> int:
        """Rows of the chunk that `row` lies in."""
        return min(CHUNK, self.rows - self.row // CHUNK * CHUNK)


# What the table's weight column may say, of a call and of the whole stack
CONDITIONS: dict[str, Callable[[Call, tuple[Call, ...]], bool]] = {
    "any": lambda call, stack: True,
    "dense": lambda call, stack: call.bits == 16,
    "4-bit": lambda call, stack: call.bits == 4,
    "4-bit in aligned blocks": lambda call, stack: (
        call.bits == 4 and call.columns % call.blocksize == 0 and call.blocksize in [2**i for i in range(5, 20)]
    ),
    "float32 sums": lambda call, stack: not (call.level == "avx512bf16" and call.x is torch.bfloat16),
    "no dropout with a gain": lambda call, stack: not call.dropped_gain,
    "no dropout with a gain in the stack": lambda call, stack: not any(c.dropped_gain for c in stack),
    "no adapters by pointer in it": lambda call, stack: not any(c.by_pointer for c in stack),
    "8 adapters in use": lambda call, stack: call.adapters >= 8,
    "4 of 5 lanes hold a row": lambda call, stack: 5 * call.rows >= 4 * (-(-call.rows // LANES) * LANES),
}


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    first: int
    last: int
    of_chunk: bool
    conditions: tuple[str, ...]
    level: str
    file: str

    def meets(self, call: Call, stack: tuple[Call, ...]) -> bool:
        levels = native.levels()
        if self.level != "all" and (self.level not in levels or levels.index(call.level) < levels.index(self.level)):
            return False
        rows = call.chunk if self.of_chunk else call.rows
        return self.first <= rows <= self.last and all(CONDITIONS[c](call, stack) for c in self.conditions)


def table() -> list[Row]:
    """The table that stands in the first comment of lora_linear.inc."""
    lines = [line.strip(" *") for line in HEAD.splitlines()]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["rows of x", "weight", "level", "file"]
    rows = []
    for size, weight, level, file in cells[2:]:
        found = re.fullmatch(r"any|(\d+)-(\d+)( of a chunk)?", size)
        assert found is not None, f"rows of x: any, or a range (of a chunk), not {size!r}"
        first, last = (1, 1 << 60) if size == "any" else (int(found[1]), int(found[2]))
        rows.append(Row(first, last, found[3] is not None, tuple(weight.split("; ")), level, file))
    return rows


def files() -> list[str]:
    """The file that each pk_lora_path stands for, by its number."""
    found = re.search(r"typedef enum pk_lora_path \{(.*?)\}", (ROOT / "csrc" / "pk_abi.h").read_text())
    assert found is not None
    return [f"forward_{name.lower()}.inc" for name in re.findall(r"PK_PATH_(\w+)", found[1])]


def ask(stack: tuple[Call, ...]) -> list[str]:
    """The library's answer, for each projection of a stack."""
    kept, packed = [], b""
    code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    somewhere = torch.zeros(1, dtype=torch.int64)  # for what the choice does not read
    p = somewhere.data_ptr()
    for call in stack:
        n, r, many = 32, call.rank, (0,) * 7
        a = b = p if r else 0
        if call.adapters:
            count = call.adapters + call.idle
            without = int(call.idle > 0)  # rows that have none
            mine = torch.arange(call.rows) % (count + without) - without
            ranks = torch.tensor([r] * call.adapters + [0] * call.idle)
            starts = torch.arange(count) * r * (ranks > 0)
            pointers = torch.full((count,), p)
            kept += [mine, ranks, starts, pointers]
            if call.by_pointer:
                a = b = pointers.data_ptr()
            many = (mine.data_ptr(), 0 if call.by_pointer else starts.data_ptr(), ranks.data_ptr(), p, count,
                    0 if call.by_pointer else count * r, r)  # fmt: skip
        packed += _ARGS.pack(
            p, p, p, 0, 0, 0, a, b, 0, p, p, p, 0, 0, 0, 0, call.rows, n, call.columns, r, int(call.bits == 4),
            call.blocksize, 256, code[call.x], 0, 0, 0, 0, 1, 1.0, call.dropout, p if call.gain else 0, 0, 0, *many,
        )  # fmt: skip
    before, paths = native.level(), array("q", [-1] * len(stack))
    native.set_level(stack[0].level)
    try:
        native.check(native.cpu().pk_cpu_lora_linear_paths(packed, len(stack), stack[0].row, paths.buffer_info()[0]))
    finally:
        native.set_level(before)
    return [files()[i] for i in paths]


def calls() -> Iterator[Call]:
    """Every combination that the table could tell apart, about its borders."""
    weights = [(16, 128, 64), (4, 128, 64), (4, 128, 32), (4, 128, 16), (4, 144, 48), (4, 96, 64)]
    adapters = [(0, 0, False), (1, 0, False), (7, 2, False), (8, 0, False), (9, 3, False), (9, 0, True)]
    extras = [(0.0, False, 8), (0.5, False, 8), (0.0, True, 8), (0.5, True, 8), (0.5, True, 0), (0.0, False, 0)]
    sizes = [1, 4, 5, 12, 13, 25, 26, 96, 97, 102, 103, 128, 129, 512, 513, 608, 609]
    for rows, level, x, weight, many, extra in product(
        sizes, LEVELS, (torch.float32, torch.bfloat16, torch.float16), weights, adapters, extras
    ):
        in_use, idle, by_pointer = many
        dropout, gain, rank = extra
        if in_use and (gain or not rank or rows < in_use + idle + (idle > 0)):
            continue  # refused; of rank 0; or not all adapters have a row
        for row in {0, rows - 1} if rows > CHUNK else {0}:
            yield Call(rows, level, x, *weight, rank, in_use, idle, by_pointer, dropout, gain, row)


@pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
@pytest.mark.parametrize("level", LEVELS)
def test_the_table_says_which_file_serves(level: str) -> None:
    rows, met = table(), set()
    assert {row.file for row in rows} == set(files())
    for row in rows:
        assert (FOLDER / row.file).is_file()
        assert set(row.conditions) <= set(CONDITIONS), "a condition that this test does not know"
    for call in calls():
        if call.level == level:
            first = next(i for i, row in enumerate(rows) if row.meets(call, (call,)))
            assert ask((call,)) == [rows[first].file], (call, rows[first])
            met.add(first)
    there = {"all", *LEVELS[: LEVELS.index(level) + 1]}
    assert met == {i for i, row in enumerate(rows) if row.level in there}, "a row of the table that no call meets"


@pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 4, 5, 64, 128, 600])
def test_each_projection_of_a_stack_has_its_own_row(level: str, rows: int) -> None:
    dense, many = Call(rows, level), Call(rows, level, adapters=min(rows, 9), by_pointer=True)
    codes, straddling = Call(rows, level, bits=4), Call(rows, level, bits=4, blocksize=48)
    gain = replace(dense, dropout=0.5, gain=True)
    for stack in product((dense, codes, straddling, gain, many), repeat=2):
        want = [next(row.file for row in table() if row.meets(call, stack)) for call in stack]
        assert ask(stack) == want, stack


@pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
def test_a_row_that_is_none_of_x_is_refused() -> None:
    with pytest.raises(native.NativeError, match="row must be one of the 4 of x, got 4"):
        ask((Call(4, LEVELS[0], row=4),))


def test_the_documents_name_every_file() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for path in FOLDER.iterdir():
        assert path.name in text, f"no document names csrc/cpu/lora/{path.name}"
        assert path.suffix == ".cpp" or path == FOLDER / "lora_linear.inc" or path.name in HEAD, path.name
