"""Records calls of the CPU library's C ABI, with all the memory that they read and write, into a file.

`tests/sanitize/replay.cpp` makes them again under sanitizers. What a pointer points to is known from the tensor whose
`data_ptr` it is: its bytes are an operand, exactly. Which pointers are read and which written the header says by
`const`. Each call is made once at every instruction set level of this machine, and what it gave at each is kept.

The file, little-endian: the magic number, the levels, the number of records; then of each record its function, a label,
its blocks of memory, arguments, and for each level the code that it returned and the blocks that it wrote. A block: its
bytes, how it is used, its pk_dtype, the words in it that point to blocks, and its content unless it is only written.
"""

from __future__ import annotations

import ctypes
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from peft_kernels import native

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "pk_abi.h"
MAGIC = 0x31737563726F6370
IN, OUT, INOUT = range(3)
INTEGER, DOUBLE, POINTER, ABSENT = range(4)
RAW = native.DTYPES[torch.uint8]
DATA_PTR = torch.Tensor.data_ptr
# which return a number that is no pk_status
_OTHER_RESULTS = ("pk_abi_version", "pk_lora_args_size", "pk_attention_args_size", "pk_cpu_unchanged")


class Function(NamedTuple):
    """An entry point. parameters: of each its name and its type."""

    result: str
    parameters: tuple[tuple[str, str], ...]


def _typed(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"\s*(.*?)(\w+)\s*", text, flags=re.S)
    assert found, text
    return found[2], re.sub(r"\s+", " ", found[1]).strip()


def _header() -> str:
    return re.sub(r"/\*.*?\*/", " ", HEADER.read_text(), flags=re.S)


@lru_cache
def entry_points() -> dict[str, Function]:
    """All functions that the header declares for the CPU library."""
    found = re.findall(r"^PK_EXPORT ([\w ]+?[ *]+)(\w+)\(([^)]*)\);", _header(), flags=re.M)
    return {
        name: Function(result.strip(), () if given == "void" else tuple(map(_typed, given.split(","))))
        for result, name, given in found
        if not name.startswith("pk_cuda_")
    }


@lru_cache
def fields(name: str) -> tuple[tuple[str, str], ...]:
    """The fields of a struct of the header, each 8 bytes wide: name and type."""
    body = re.search(rf"typedef struct {name} {{(.*?)}} {name};", _header(), flags=re.S)
    assert body, name
    found = []
    for line in filter(str.strip, body[1].split(";")):
        first, *more = line.split(",")
        field, of_type = _typed(first)
        found += [(field, of_type)]
        found += [(one.strip().lstrip("*"), of_type.rstrip("* ") + " *" * one.strip().startswith("*")) for one in more]
    return tuple(found)


def _structs(name: str, content: bytes) -> list[dict[str, int]]:
    """The structs of an array: of each its fields, of doubles their bits."""
    names = [field for field, _ in fields(name)]
    words = struct.iter_unpack(f"={len(names)}q", content)
    return [dict(zip(names, row, strict=True)) for row in words]


class Memory:
    """The memory of the tensors whose addresses were asked for, which stay alive as long. Of those that begin at one
    address the longest is found that one call asked for, since a part can be an operand beside its whole."""

    def __init__(self) -> None:
        self.of_this_call: set[int] = set()
        self._spans: dict[int, tuple[int, int]] = {}
        self._sorted: list[int] = []
        self._alive: list[torch.Tensor] = []

    def saw(self, t: torch.Tensor) -> int:
        """The tensor's address."""
        address = DATA_PTR(t)
        if address:
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            span = (last + 1) * t.element_size(), native.DTYPES.get(t.dtype, RAW)
            asked = address in self.of_this_call
            self._spans[address] = max(span, self._spans[address], key=itemgetter(0)) if asked else span
            self.of_this_call.add(address)
            self._alive.append(t)
        return address

    def find(self, address: int) -> tuple[int, int, int]:
        """Where the tensor that an address lies in begins, its bytes and dtype. Raises LookupError."""
        if len(self._sorted) != len(self._spans):
            self._sorted = sorted(self._spans)
        at = bisect_right(self._sorted, address)
        for start in reversed(self._sorted[max(0, at - 8) : at]):
            size, dtype = self._spans[start]
            if address < start + size:
                return start, size, dtype
        raise LookupError(f"no tensor seen lies at {address:#x}")


class _Block:
    def __init__(self, address: int, size: int, dtype: int, use: int, content: bytes | None = None) -> None:
        self.address, self.size, self.dtype, self.use = address, size, dtype, use
        self.content = content  # of what has no tensor, and is only read
        self.relocations: list[tuple[int, int, int]] = []

    def now(self) -> bytes:
        return ctypes.string_at(self.address, self.size) if self.content is None else self.content


class Call:
    """One call: its arguments, and the graph of the memory behind them."""

    def __init__(self, memory: Memory, name: str, given: Sequence[Any]) -> None:
        self.memory, self.name = memory, name
        self.blocks: list[_Block] = []
        self._at: dict[tuple[int, int], int] = {}
        parameters = entry_points()[name].parameters
        assert len(parameters) == len(given), name
        values = dict(zip([name for name, _ in parameters], given, strict=True))
        self.arguments = [self._argument(*parameter, values) for parameter in parameters]

    def _argument(self, name: str, of_type: str, values: dict[str, Any]) -> tuple[int, int | float, int]:
        value = values[name]
        if isinstance(value, ctypes.c_void_p):
            value = value.value
        if of_type == "double":
            return DOUBLE, float(value), 0
        if "*" not in of_type:
            return INTEGER, int(value), 0
        if not value:
            return ABSENT, 0, 0
        if isinstance(value, bytes):
            block = self._add(_Block(0, 0, RAW, IN, value + b"\0" * (of_type == "const char *")))
            if of_type in ("const pk_lora_args *", "const pk_adamw *", "const pk_attention_args *"):
                self._struct(block, of_type.split()[1])
            return POINTER, 0, block
        if name == "addresses":
            return POINTER, 0, self._table(value, values["count"], IN)
        size = {"square": 8, "paths": 8 * values.get("count", 0)}.get(name)
        if self.name.startswith("pk_cpu_dora") and name in ("magnitude", "gain", "norm"):
            size = 4 * _structs("pk_lora_args", values["args"])[0]["N"]
        block, at = self._pointer(value, IN if of_type.startswith("const") else OUT, size)
        return POINTER, at, block

    def _add(self, block: _Block) -> int:
        if block.content is not None:
            block.size = len(block.content)
        self.blocks.append(block)
        return len(self.blocks) - 1

    def _pointer(self, address: int, use: int, size: int | None = None) -> tuple[int, int]:
        """The block that an address lies in, and where. size: of what is no tensor."""
        start, size, dtype = self.memory.find(address) if size is None else (address, size, RAW)
        index = self._at.get((start, size))
        if index is None:
            index = self._at[start, size] = self._add(_Block(start, size, dtype, use))
        elif self.blocks[index].use != use:
            self.blocks[index].use = INOUT
        return index, address - start

    def _table(self, address: int, count: int, use: int) -> int:
        """A block of `count` pointers, each to what is used so."""
        content = ctypes.string_at(address, 8 * count)
        index = self._add(_Block(0, 0, RAW, IN, content))
        for i, target in enumerate(struct.unpack(f"={count}q", content)):
            if target:
                self.blocks[index].relocations.append((8 * i, *self._pointer(target, use)))
        return index

    def _struct(self, index: int, name: str) -> None:
        """Relocate the pointers of an array of structs."""
        block = self.blocks[index]
        assert block.content is not None
        offset = -8
        for values in _structs(name, block.content):
            by_pointer = values.get("adapters") and not values["starts"] and values["S"] > 0
            for field, of_type in fields(name):
                offset += 8
                if "*" not in of_type or not values[field]:
                    continue
                if by_pointer and field in ("a", "b", "da", "db"):
                    to = self._table(values[field], values["S"], IN if field in "ab" else OUT), 0
                elif name == "pk_adamw":  # the header says how large they are
                    size = 4 if field == "step" else 4 * values["numel"]
                    to = self._pointer(values[field], IN if field == "grad" else INOUT, size)
                elif name == "pk_attention_args":
                    written = ("y", "lse") if self.name == "pk_cpu_attention" else ("dq", "dk", "dv")
                    to = self._pointer(values[field], OUT if field in written else IN)
                else:  # these can be parts of one tensor
                    known = {"s": 4 * values["M"] * values["r"], "gain": 4 * values["N"], "dgain": 4 * values["N"]}
                    to = self._pointer(values[field], self._use(field), known.get(field))
                block.relocations.append((offset, *to))

    def _use(self, field: str) -> int:
        """IN or OUT for a field of pk_lora_args, whose comments say what `const` does not."""
        if field == "gain" and self.name == "pk_cpu_dora_linear":
            return OUT
        forward = self.name in ("pk_cpu_lora_linear", "pk_cpu_lora_mixture", "pk_cpu_dora_linear",
                                "pk_cpu_butterfly_linear", "pk_cpu_grouped_linear")  # fmt: skip
        if field == "s" and "grouped" in self.name:
            return INOUT  # room, of which rows without a group have no use
        written = ("y", "s", "h") if forward else ("dx", "da", "db", "dgain") if "backward" in self.name else ()
        return OUT if field in written else IN


class Recorded(NamedTuple):
    """A call in the file. served: it has not been refused. sizes: bytes of each block. results: where in the file."""

    name: str
    served: bool
    sizes: list[int]
    results: int


class Recorder:
    """Writes calls into a file, from its first to its `close`."""

    def __init__(self, path: Path) -> None:
        self.memory, self.label = Memory(), ""
        self.calls: list[Recorded] = []
        self._library, self._file = native.cpu(), path.open("wb")
        best = native.level()
        self._levels = [*(level for level in native.levels() if level != best), best]  # the caller gets its own last
        self._levels_at = native.levels()
        self._file.write(struct.pack("<QI", MAGIC, len(self._levels_at)))
        for level in self._levels_at:
            _text(self._file, level)
        self._count_at = self._file.tell()
        self._file.write(struct.pack("<Q", 0))

    def close(self) -> None:
        self._file.seek(self._count_at)
        self._file.write(struct.pack("<Q", len(self.calls)))
        self._file.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A function of the library, whose calls are recorded."""
        if name not in entry_points():
            raise AttributeError(name)
        return lambda *given: self.call(name, given)

    @contextmanager
    def recording(self, label: str) -> Iterator[None]:
        """While it is open, the native binding calls through this recorder."""
        self.label, self.memory = label, Memory()
        before, native._loaded["cpu"] = native._loaded["cpu"], self  # type: ignore[assignment]
        torch.Tensor.data_ptr = lambda t: self.memory.saw(t)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.Tensor.data_ptr = DATA_PTR  # type: ignore[method-assign]
            native._loaded["cpu"] = before
            self.memory = Memory()

    def call(self, name: str, given: Sequence[Any]) -> Any:
        function = getattr(self._library, name)
        call, results, result = Call(self.memory, name, given), {}, None
        self.memory.of_this_call.clear()
        contents = [None if block.use == OUT else block.now() for block in call.blocks]
        for level in self._levels:
            self._library.pk_cpu_set_level(level.encode())
            for block, content in zip(call.blocks, contents, strict=True):
                if block.use == INOUT:
                    ctypes.memmove(block.address, content, block.size)
            result = function(*given)
            code = (-1 if result is None else 0) if "char" in entry_points()[name].result else int(result)
            results[level] = code, [None if block.use == IN else block.now() for block in call.blocks]
        self._write(call, contents, [results[level] for level in self._levels_at])
        return result

    def _write(self, call: Call, contents: list[bytes | None], results: list[tuple[int, list[bytes | None]]]) -> None:
        file = self._file
        _text(file, call.name)
        _text(file, self.label)
        file.write(struct.pack("<I", len(call.blocks)))
        for block, content in zip(call.blocks, contents, strict=True):
            file.write(struct.pack("<QBBI", block.size, block.use, block.dtype, len(block.relocations)))
            for offset, index, at in block.relocations:
                file.write(struct.pack("<QIQ", offset, index, at))
            file.write(content or b"")
        file.write(struct.pack("<I", len(call.arguments)))
        for form, value, index in call.arguments:
            file.write(struct.pack("<Bd" if form == DOUBLE else "<Bq", form, value) + struct.pack("<I", index))
        served = not any(code for code, _ in results) or call.name in _OTHER_RESULTS
        self.calls.append(Recorded(call.name, served, [block.size for block in call.blocks], file.tell()))
        for code, blocks in results:
            file.write(struct.pack("<q", code))
            for i, content in enumerate(blocks):
                if content is not None:
                    again = blocks is not results[0][1] and content == results[0][1][i]
                    file.write(b"\1" if again else b"\0" + content)


def _text(file: BinaryIO, text: str) -> None:
    data = text.encode()
    file.write(struct.pack("<I", len(data)) + data)
