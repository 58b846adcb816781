"""Checks of names, paths and json from outside, and the errors of files that must not be used.

Everything is read with bounds, and whatever breaks one raises `AdapterFileError` with the file, what was found and what
was expected. Nothing here imports a name that stands in a file, and nothing unpickles.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 16 << 20  # an adapter of 46 thousand experts names each up to three times, in 3 MB each
_BYTES_A_VALUE = 32  # at least, on average

TUNER = "base_model."  # where a PeftModel has its tuner, which holds what layers share
PREFIX = TUNER + "model."  # where keys of tensors have the base model
LEAVES = "a link in it leaves the folder of the adapters"


class AdapterFileError(ValueError):
    """A file, name or configuration that must not be used; the message says which rule it breaks.

    rule: the same for strangers, without the file's place and without anything that it holds.
    """

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


def rule_of(error: BaseException) -> str:
    """The part of an error about a file that strangers may see: never where it lies, nor what is in it."""
    if isinstance(error, AdapterFileError) and error.rule:
        return error.rule
    if isinstance(error, FileNotFoundError):
        return "a file of it is missing"
    if isinstance(error, OSError):
        return f"a file of it cannot be read ({os.strerror(error.errno) if error.errno else type(error).__name__})"
    return f"it cannot be used with this model ({type(error).__name__})"


class KeyMismatchError(AdapterFileError, RuntimeError):
    """Tensors that do not fit the model: missing, unexpected or of another size. The message lists them."""


class NotAnAdapterError(AdapterFileError, TypeError):
    """A configuration that is none of an adapter. PEFT raises TypeError."""


def path_inside(root: str | os.PathLike[str], *parts: str) -> Path:
    """`root/parts...`, symbolic links followed, which must not leave `root`."""
    base = Path(root).resolve()
    path = base.joinpath(*parts).resolve()
    if path != base and base not in path.parents:
        raise AdapterFileError(f"path {short('/'.join(parts))} leaves its folder {base}", LEAVES)
    return path


def short(value: object, limit: int = 80) -> str:
    """A value from a file, for error messages: at most `limit` characters of it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _no_constant(text: str) -> float:
    raise AdapterFileError(f"json holds {text}, which is not a number", "json holds what is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise AdapterFileError(f"json names {short(key)} twice", "json has a name twice")
        found[key] = value
    return found


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """A json object without NaN or Infinity and without repeated keys; anything else is an error that names `where`."""
    name = name_of(where)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}", f"{name}: {error.rule}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where}: not valid json ({short(str(error))})", f"{name}: not valid json") from None
    if not isinstance(value, dict):
        rule = "expected a json object"
        raise AdapterFileError(f"{where}: {rule}, found {type(value).__name__}", f"{name}: {rule}")
    return value


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a json object of at most `max_bytes`."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        rule = f"larger than {max_bytes} bytes, too large for a configuration"
        raise AdapterFileError(f"{path}: {rule}", f"{name_of(path)}: {rule}")
    if data.count(b",") > (most := max_bytes // _BYTES_A_VALUE):  # parsing millions of anything takes seconds
        raise AdapterFileError(f"{path}: more than {most} values", f"{name_of(path)}: more than {most} values")
    return parse_json(data, path)


def name_of(where: object) -> str:
    """The last part of a file's path, which is all that strangers see of it."""
    return os.path.basename(os.fspath(where)) if isinstance(where, (str, os.PathLike)) else ""


@dataclass(frozen=True)
class Confined(os.PathLike[str]):
    """A path into which strangers may write, and that is opened without ever leaving `root`.

    Links are followed as far as they stay below `root`. Both must be resolved. A hard link looks like any other file.
    """

    path: Path
    root: Path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    __str__ = __fspath__

    def __truediv__(self, name: str) -> Confined:
        return Confined(self.path / name, self.root)

    def exists(self) -> bool:
        """True also for a link to something that is not there."""
        return os.path.lexists(self.path)

    def opened(self, flags: int) -> int:
        """A handle of what is there now, each part of the way opened in the part before, and none of them a link: what
        is put there between a check and its use, by whoever, is not followed."""
        handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = Path(os.path.realpath(self.path))
            if self.root not in place.parents:
                raise AdapterFileError(f"{self.path}: a link in this path leaves the folder {self.root}", LEAVES)
            *folders, last = place.relative_to(self.root).parts
            for part in folders:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                os.close(handle)
                handle = inner
            return os.open(last, flags | os.O_NOFOLLOW, dir_fd=handle)
        except OSError as error:
            if error.errno not in _SWAPPED:
                raise
            rule = "changed while it was opened, or a loop of links"
            raise AdapterFileError(f"{self.path}: {rule}", f"{name_of(self)}: {rule}") from None
        finally:
            os.close(handle)


# For a link in the place of a file or folder, by system, and for the reverse.
_SWAPPED = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.EINVAL)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. A pipe or device in its place would block or never end.

    path: links are followed, as those of the Hub's cache have to be; of one that is `Confined` as that says.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = -1
    try:
        if isinstance(path, Confined):
            handle = path.opened(flags)
        elif not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist")
        elif os.path.isfile(path):  # opening a device can do things
            handle = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
    if handle < 0 or not stat.S_ISREG(os.fstat(handle).st_mode):
        if handle >= 0:
            os.close(handle)
        raise AdapterFileError(f"{path}: not a regular file", f"{name_of(path)}: not a regular file")
    return os.fdopen(handle, "rb")


def list_some(names: Iterable[str], limit: int = 8) -> str:
    """The first names and how many more there are, for error messages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def mismatch(key: str, shape: Sequence[int], expected: Sequence[int]) -> str:
    """One tensor of another size, for `report`."""
    return f"{key} {list(shape)}, expected {list(expected)}"


def report(
    where: object, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str],
    wrong: Sequence[str] = (),
) -> None:  # fmt: skip
    """Raise KeyMismatchError that lists the keys of tensors that do not fit; nothing if there are none."""
    found = {"missing": missing, "unexpected": unexpected, "size mismatch for": mismatched, "not floating-point": wrong}
    problems = [f"{label}: {list_some(keys)}" for label, keys in found.items() if keys]
    if problems:
        counts = ", ".join(f"{label.removesuffix(' for')}: {len(keys)}" for label, keys in found.items() if keys)
        raise KeyMismatchError(
            f"{where} does not fit the model. " + ". ".join(problems),
            f"its tensors do not fit the model and its configuration ({counts})",
        )
