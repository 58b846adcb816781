"""A jsonl file larger than memory: where each line begins, and lines read when they are used."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from .errors import UserError
from .records import Check, Record, parse, too_deep

Located = tuple[str, Record]  # ``file:line`` and the record there
Records = Sequence[Located]
_IN_MEMORY = 1 << 20  # bytes of a table; more of it is in a temporary file


class Table:
    """Rows of whole numbers, appended and looked up; large ones are on disk, in a file without a name (TMPDIR).

    form: of `struct`, one row.
    """

    def __init__(self, form: str) -> None:
        self._row, self._count = struct.Struct(form), 0
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - it goes with this object
        weakref.finalize(self, self._file.close)

    def append(self, *row: int) -> None:
        """Only before the first look: afterwards the file's position is elsewhere."""
        self._file.write(self._row.pack(*row))
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        self._file.seek(index * self._row.size)
        return self._row.unpack(self._file.read(self._row.size))


class _Lazy(Records):
    """Records that are read one at a time. digest: sha256 of all of them."""

    digest: str

    @overload
    def __getitem__(self, index: int) -> Located: ...
    @overload
    def __getitem__(self, index: slice) -> list[Located]: ...
    def __getitem__(self, index: int | slice) -> Located | list[Located]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        return self._read(index)

    def _read(self, index: int) -> Located:
        raise NotImplementedError


class JsonLines(_Lazy):
    """The records of a jsonl file. Blank lines are skipped.

    All lines are read and checked once, here; the first that cannot be learned from raises UserError, with file and
    line. Memory then holds no line. One that is another when it is read again raises, too.
    check: as of `records.parse`.
    """

    def __init__(self, path: str, check: Check | None = None) -> None:
        self.path, self._check = path, check
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"data: expected a jsonl file, {path} is not a file", "give the path of an existing file")
        self._file = file.open("rb")
        weakref.finalize(self, self._file.close)
        self._index = Table("<QQI")  # of each record: its offset, the number of its line, the line's checksum
        offset, digest = 0, hashlib.sha256()
        for number, raw in enumerate(self._file, start=1):
            if raw.strip():
                self._parse(raw, number)
                self._index.append(offset, number, zlib.crc32(raw))
                digest.update(raw)
            offset += len(raw)
        self.digest = digest.hexdigest()
        if not self._index:
            raise UserError(f"data: {path} holds no records", "write one JSON object with prompt and completion a line")

    def __len__(self) -> int:
        return len(self._index)

    def _parse(self, raw: bytes, number: int) -> Located:
        where = f"{self.path}:{number}"
        return where, parse(raw, where, "utf-8-sig" if number == 1 else "utf-8", self._check)

    def _read(self, index: int) -> Located:
        offset, number, checksum = self._index[index]
        self._file.seek(offset)
        raw = self._file.readline()
        if zlib.crc32(raw) != checksum:
            raise UserError(
                f"{self.path}:{number}: the line was changed since training began",
                "put the file back to go on with --resume, or begin anew",
            )
        return self._parse(raw, number)


class _Chosen(_Lazy):
    """Some of other records, in their order."""

    def __init__(self, records: Records) -> None:
        self._records, self._index, self._digest = records, Table("<Q"), hashlib.sha256()

    def append(self, index: int, digest: bytes) -> None:
        self._index.append(index)
        self._digest.update(digest)

    @property
    def digest(self) -> str:  # type: ignore[override]
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    def _read(self, index: int) -> Located:
        (at,) = self._index[index]
        return self._records[int(at)]


def split(records: Records, fraction: float) -> tuple[Records, Records]:
    """(to train, held out), by a hash of each record's content: equal ones fall on one side, and files may be
    reordered."""
    train, held_out = _Chosen(records), _Chosen(records)
    for i, (where, record) in enumerate(records):
        digest = content_digest(record, where)
        (held_out if int.from_bytes(digest[:8], "big") < fraction * 2**64 else train).append(i, digest)
    if not len(train) or not len(held_out):
        raise UserError(
            f"eval_fraction={fraction} of {len(records)} leaves {len(train)} to train, {len(held_out)} to hold out",
            "give more records or another fraction",
        )
    return train, held_out


def content_digest(record: Record, where: str) -> bytes:
    """sha256 of a record, whatever the order of its keys."""
    try:
        content = json.dumps(record, sort_keys=True)
    except RecursionError:  # at the very limit of what can be read
        raise too_deep(where) from None
    return hashlib.sha256(content.encode()).digest()


def digest_of(records: Records) -> str:
    """sha256 of all records."""
    found = getattr(records, "digest", None)
    if found is None:
        found = hashlib.sha256(b"".join(content_digest(record, where) for where, record in records)).hexdigest()
    return str(found)
