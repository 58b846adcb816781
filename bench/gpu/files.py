"""Files of a run: a line of JSON for each thing that happened, on the disk before the next one begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line in one write and wait until it is on the disk. Raises OSError, with nothing of the line left, where
    the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(line, sort_keys=True) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # what a killed process left half written stays a line of its own
        written = os.write(file, data)
        if written != len(data):
            os.ftruncate(file, size)
            raise OSError(f"{path}: {written} of {len(data)} bytes were written: the disk is full")
        os.fsync(file)
    finally:
        os.close(file)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole; none of a file that is not there."""
    if not path.exists():
        return
    for text in path.read_bytes().split(b"\n"):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def rows(path: Path, digest: str | None = None) -> dict[str, dict[str, Any]]:
    """title -> the last row of that title; digest: only of a tree with that digest."""
    return {
        line["title"]: line
        for line in lines(path)
        if "title" in line and "begin" not in line and digest in (None, line.get("digest"))
    }
