"""Checks of names, paths and json from outside, and the errors of files that must not be used.

Everything is read with bounds, and whatever breaks one raises `AdapterFileError` with the file, what was found and what
was expected. Nothing here imports a name that stands in a file, and nothing unpickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 4 << 20

TUNER = "base_model."  # where a PeftModel has its tuner, which holds what layers share
PREFIX = TUNER + "model."  # where keys of tensors have the base model


class AdapterFileError(ValueError):
    """A file, name or configuration that must not be used; the message says which rule it breaks."""


class KeyMismatchError(AdapterFileError, RuntimeError):
    """Tensors that do not fit the model: missing, unexpected or of another size. The message lists them."""


def path_inside(root: str | os.PathLike[str], *parts: str) -> Path:
    """`root/parts...`, symbolic links followed, which must not leave `root`."""
    base = Path(root).resolve()
    path = base.joinpath(*parts).resolve()
    if path != base and base not in path.parents:
        raise AdapterFileError(f"path {short('/'.join(parts))} leaves its folder {base}")
    return path


def short(value: object, limit: int = 80) -> str:
    """A value from a file, for error messages: at most `limit` characters of it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _no_constant(text: str) -> float:
    raise AdapterFileError(f"json holds {text}, which is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise AdapterFileError(f"json names {short(key)} twice")
        found[key] = value
    return found


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """A json object without NaN or Infinity and without repeated keys; anything else is an error that names `where`."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where}: not valid json ({short(str(error))})") from None
    if not isinstance(value, dict):
        raise AdapterFileError(f"{where}: expected a json object, found {type(value).__name__}")
    return value


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a json object of at most `max_bytes`."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise AdapterFileError(f"{path}: larger than {max_bytes} bytes, too large for a configuration")
    return parse_json(data, path)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. A pipe or device in its place would block or never end."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise AdapterFileError(f"{path}: not a regular file")
    return open(path, "rb")


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
        raise KeyMismatchError(f"{where} does not fit the model. " + ". ".join(problems))
