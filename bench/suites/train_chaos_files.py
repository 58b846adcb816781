"""The files that train_chaos looks at and compares, and the small disk that it fills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK = 2 << 20  # bytes of the small disk
TIMED = ("seconds", "tokens_per_s", "peak_memory_mb")


def listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def count_lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what differs from run to run; a torn one is an error."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> bool:
    """Lines that are equal, numbers up to a share of them; those of an adapter in order."""
    if not tolerance:
        return found == expected
    found, expected = (sorted(lines, key=lambda line: (line["adapter"], line["step"])) for lines in (found, expected))
    return len(found) == len(expected) and all(
        a.keys() == b.keys()
        and all(abs(v - b[k]) <= tolerance * abs(b[k]) if isinstance(v, float) else v == b[k] for k, v in a.items())
        for a, b in zip(found, expected, strict=True)
    )


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A small tmpfs below a folder; None where none may be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
