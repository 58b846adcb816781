"""The header of a GGUF file: its keys and its table of tensors, without the lists of a tokenizer.

The package `gguf` reads every string of a vocabulary into arrays of its own, which takes seconds for a hundred thousand
tokens; here such lists are walked over.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # ggml's, where no key says another
_MOST_DIMENSIONS = 4  # ggml's
# value type -> its struct format
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Entry:
    """One line of the table of tensors. sizes: the fastest first, as ggml has them; quant: the number of ggml's type;
    begin: the first byte in the file."""

    name: str
    sizes: tuple[int, ...]
    quant: int
    begin: int


@dataclass(frozen=True)
class Header:
    """values: of all keys but the tokenizer's lists; tokens: how many there are, None without a list of them."""

    values: dict[str, Any]
    tokens: int | None
    tensors: tuple[Entry, ...]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Raises ValueError for what is no whole GGUF header, in words for an error that names the file."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).header()
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
                raise ValueError(f"truncated, or no GGUF header ({error})") from None


class _Reader:
    """A place in the bytes of a file, which reading moves."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, len(MAGIC)

    def numbers(self, format: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + format, self.data, self.at)
        self.at += struct.calcsize("<" + format)
        return found

    def string(self) -> str:
        (size,) = self.numbers("Q")
        if size > len(self.data) - self.at:
            raise ValueError(f"truncated: a string of {size} bytes at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def header(self) -> Header:
        (version,) = self.numbers("I")
        if version not in _VERSIONS:
            other = int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS
            raise ValueError("its byte order is not this machine's" if other else f"version {version} of GGUF, and "
                             f"{' and '.join(map(str, _VERSIONS))} are known")  # fmt: skip
        tensors, keys = self.numbers("QQ")
        values: dict[str, Any] = {}
        tokens = None
        for _ in range(keys):
            key = self.string()
            (kind,) = self.numbers("I")
            value, count = self.value(kind, skip=key.startswith("tokenizer."))
            if key in values:
                raise ValueError(f"the key {key[:80]} is there twice")
            if value is not None:
                values[key] = value
            if key == _TOKENS:
                tokens = count
        table = [self.entry() for _ in range(tensors)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment}")
        start = -(-self.at // alignment) * alignment
        moved = [Entry(one.name, one.sizes, one.quant, start + one.begin) for one in table]
        if len({one.name for one in moved}) != len(moved):
            raise ValueError("a tensor's name is there twice")
        return Header(values, tokens, tuple(moved))

    def value(self, kind: int, skip: bool) -> tuple[Any, int]:
        """(the value, how many), None in its place for a list that is passed over."""
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0], 1
        if kind == _STRING:
            return self.string(), 1
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.at}")
        inner, count = self.numbers("IQ")
        if count > len(self.data) - self.at:
            raise ValueError(f"truncated: a list of {count} values at byte {self.at}")
        if inner in _NUMBERS:
            if not skip:
                return list(self.numbers(f"{count}{_NUMBERS[inner]}")), count
            self.at += count * struct.calcsize("<" + _NUMBERS[inner])
            return None, count
        if inner == _STRING and skip:
            data, at, size_at = self.data, self.at, struct.Struct("<Q").unpack_from
            for _ in range(count):
                at += 8 + size_at(data, at)[0]
            self.at = at
            return None, count
        return [self.value(inner, skip)[0] for _ in range(count)], count

    def entry(self) -> Entry:
        name = self.string()
        (count,) = self.numbers("I")
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:80]} with {count} dimensions")
        sizes = self.numbers(f"{count}Q")
        quant, begin = self.numbers("IQ")
        return Entry(name, sizes, quant, begin)
