"""Files of a run: a line of JSON for each thing that happened, on the disk before the next one begins."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no room


def append(path: Path, line: dict[str, Any], sync: bool = True) -> None:
    """Append a line in one write and wait until it is on the disk. Several processes may do so at once. OSError, with
    nothing of the line left, where the disk is full. sync: False does not wait: the line outlives the process only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(line, sort_keys=True, allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # what a killed process left half written stays a line of its own
        written = os.write(file, data)
        if written != len(data):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written: the disk is full", str(path))
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def tell(path: Path, line: dict[str, Any]) -> None:
    """Leave a line for whoever looks after this process has ended, in place of the one before. Takes microseconds."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        data = (json.dumps(line) + "\n").encode()
        os.pwrite(file, data, 0)
        os.ftruncate(file, len(data))
    finally:
        os.close(file)


def lines(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole, from byte `start` on; none of a file that is not there."""
    try:
        data = path.read_bytes()[start:]
    except FileNotFoundError:
        return
    for text in data.split(b"\n"):
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


def settings(out: Path) -> dict[str, Any]:
    """Settings that the runner leaves for the processes that it starts; empty where there is no run."""
    try:
        found: dict[str, Any] = json.loads((out / SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return found


def marks(settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of every line: of which tree it is, from which call, and that a fake device made it."""
    fake = {"fake": True} if settings.get("fake") else {}
    return {"digest": settings.get("digest"), "session": settings.get("session"), **fake}


def replace(path: Path, text: str) -> None:
    """Write a file whole: a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
