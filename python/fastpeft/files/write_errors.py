"""The error of a write for which there is no room, named as what it is, whoever wrote."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than this process or file system may have (ulimit -f)",
    errno.EMFILE: "this process has too many files open (ulimit -n)",
    errno.ENFILE: "the system has too many files open",
    errno.EROFS: "the file system is read-only",
}


class WriteError(OSError):
    """A file or folder was not written, and what was there before is whole. `errno` is the system's, `filename` what
    was to be written."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextmanager
def named_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within this, an error for want of room becomes a WriteError that names `path`, also where a library hides it
    (safetensors and torch raise errors of their own). Others stay as they are."""
    try:
        yield
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        said = error.strerror if isinstance(error, OSError) else error
        raise WriteError(code, f"{_WHY[code]} ({said})", os.fspath(path)) from error


def _code_of(error: BaseException) -> int | None:
    """The system's error of a failed write, if it is one of `_WHY`."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _WHY else None
    if type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError):
        # torch's writer raises its own error while Python's is on the way
        if isinstance(error.__context__, OSError):
            return _code_of(error.__context__)
        # the longest: "Too many open files in system" has "Too many open files" in it
        return max((c for c in _WHY if os.strerror(c) in str(error)), key=lambda c: len(os.strerror(c)), default=None)
    return None


class Spare:
    """Some open files, given back when a temporary folder is to be removed: else it would stay when there are too many
    of them, since removing a folder opens it."""

    def __init__(self, count: int = 4) -> None:
        self._handles: list[int] = []
        try:
            for _ in range(count):
                self._handles.append(os.open(os.devnull, os.O_RDONLY))
        except BaseException:
            self.give_back()
            raise

    def __enter__(self) -> Spare:
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        while self._handles:
            with suppress(OSError):
                os.close(self._handles.pop())
