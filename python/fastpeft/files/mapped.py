"""Files mapped into this process, also those larger than memory, and their pages given back while the mapping stays."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

_DONTNEED, _NORESERVE = 4, getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Linux' mman.h; Python has the second from 3.13
_MAPS = "/proc/self/maps"


def map_bytes(path: str | os.PathLike[str], size: int) -> torch.Tensor:
    """The first `size` bytes of a file, uint8: read when they are used; what is written to them stays in this process.

    A file larger than memory is mapped, too: Linux would set memory aside for all that may be written to such a
    mapping, and refuse it, so it is told not to. Raises OSError where the file is shorter.
    """
    if not sys.platform.startswith("linux"):
        return torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
    with open(path, "rb") as file:
        flags, allowed = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            mapping = mmap.mmap(file.fileno(), size, flags, allowed)
        except ValueError as error:
            raise OSError(f"{os.fspath(path)}: {error}") from error
    return torch.frombuffer(mapping, dtype=torch.uint8)


class MappedFiles:
    """Files that somebody is going to map. `release` gives their pages back, which else count as this process's memory.

    Only mappings made after this one was: an earlier one may be of a model that is in use, and changed.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        found = (os.stat(path) for path in paths)
        self._files = {(os.major(s.st_dev), os.minor(s.st_dev), s.st_ino) for s in found}
        self._before = {start for start, _ in self._ranges()}

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """(address, bytes) of each of their mappings."""
        if not sys.platform.startswith("linux") or not os.path.exists(_MAPS):
            return
        for line in Path(_MAPS).read_text(encoding="utf-8", errors="replace").splitlines():
            span, _, _, device, inode, *_ = line.split(maxsplit=5)
            major, minor = (int(part, 16) for part in device.split(":"))
            if (major, minor, int(inode)) in self._files:
                start, end = (int(part, 16) for part in span.split("-"))
                yield start, end - start

    def release(self) -> None:
        """Give back all their pages; they are read again where they are wanted again. Nothing on other systems than
        Linux. Whoever wrote into such a mapping loses that."""
        advise = _madvise()
        for start, size in self._ranges() if advise is not None else ():
            if start not in self._before:
                advise(start, size, _DONTNEED)


@cache
def _madvise() -> Any:
    found = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform.startswith("linux") else None
    if found is not None:
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found
