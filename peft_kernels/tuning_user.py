"""The user's table of launch configurations: what `fastpeft tune` measured on this machine's GPUs.

One file an architecture, `tuned/sm_90.json` in the cache folder (`cache_root`). A row is a GPU's name, a kernel, a
bucket of shapes and the fastest configuration. It counts only on a GPU of that name; a file that cannot be read is an
error, not a silent return to the frozen tables.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
SHAPE = ("M", "N", "K", "r", "bits", "plain", "blocksize")
CONFIG = ("BM", "BN", "BK", "BR", "GROUP", "num_warps", "num_stages", "programs", "LEFT", "source")
_KEY = ("gpu", "kernel", *SHAPE)


def cache_root() -> Path:
    """`PEFT_KERNELS_CACHE`, else `peft-kernels` under `XDG_CACHE_HOME` or `~/.cache`. It need not exist."""
    if chosen := os.environ.get("PEFT_KERNELS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "peft-kernels"


def path(arch: str) -> Path:
    """The user table of an architecture, "sm_90"; it need not exist."""
    return cache_root() / "tuned" / f"{arch}.json"


def read(table: Path) -> list[dict[str, Any]]:
    """The rows of a user table; none where there is no file. ValueError where it is not such a table."""
    try:
        text = table.read_text()
    except FileNotFoundError:
        return []
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, expected {FORMAT}")
        found: list[dict[str, Any]] = data["rows"]
        for row in found:
            if missing := {*_KEY, *CONFIG} - set(row):
                raise ValueError(f"a row without {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{table}: expected a table written by `fastpeft tune`, got {error!r}; delete the file or tune again"
        ) from error
    return found


def write(table: Path, new: Iterable[dict[str, Any]]) -> int:
    """Add rows to a table, in place of those of the same GPU, kernel and shape; the number it then has.

    The file is replaced whole: a reader sees the old table or the new one.
    """
    merged = {tuple(row[k] for k in _KEY): row for row in [*read(table), *new]}
    table.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n    ".join(json.dumps(row) for row in merged.values())
    handle, temporary = tempfile.mkstemp(dir=table.parent, prefix=table.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f'{{\n  "format": {FORMAT},\n  "rows": [\n    {lines}\n  ]\n}}\n')
        os.replace(temporary, table)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    rows.cache_clear()
    return len(merged)


def gpus() -> frozenset[str]:
    """The names of the GPUs that this process sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return frozenset(torch.cuda.get_device_name(i) for i in range(count))


@lru_cache(maxsize=16)
def rows(arch: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(kernel, *shape) -> values of the configuration, of the rows that hold for the GPUs here. Read once a process."""
    here = gpus()
    if not here:
        return {}
    return {
        (row["kernel"], *(row[k] for k in SHAPE)): {k: row[k] for k in CONFIG}
        for row in read(path(arch))
        if row["gpu"] in here
    }
