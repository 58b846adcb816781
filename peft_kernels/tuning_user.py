"""The user's table of launch configurations: what `fastpeft tune` measured on this machine's GPUs.

One file an architecture, `<folder>/sm_90.json`, in `$PEFT_KERNELS_TUNED`, else `$XDG_CACHE_HOME/peft-kernels/tuned`,
else `~/.cache/peft-kernels/tuned`. A row is a GPU's name, a kernel, a bucket of shapes and the fastest configuration.
It counts only on a GPU of that name; a file that cannot be read is an error, not a silent return to the frozen tables.
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

ENV = "PEFT_KERNELS_TUNED"
FORMAT = 1
SHAPE = ("M", "N", "K", "r", "bits", "plain", "blocksize")
CONFIG = ("BM", "BN", "BK", "BR", "GROUP", "num_warps", "num_stages", "programs", "LEFT", "source")
_KEY = ("gpu", "kernel", *SHAPE)


def folder() -> Path:
    """Where user tables are; it need not exist."""
    if named := os.environ.get(ENV):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "peft-kernels" / "tuned"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a user table; none where there is no file. ValueError where it is not such a table."""
    try:
        text = path.read_text()
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
            f"{path}: expected a table written by `fastpeft tune`, got {error!r}; delete the file or tune again"
        ) from error
    return found


def write(path: Path, new: Iterable[dict[str, Any]]) -> int:
    """Add rows to a table, in place of those of the same GPU, kernel and shape; the number it then has.

    The file is replaced whole: a reader sees the old table or the new one.
    """
    merged = {tuple(row[k] for k in _KEY): row for row in [*read(path), *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n    ".join(json.dumps(row) for row in merged.values())
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f'{{\n  "format": {FORMAT},\n  "rows": [\n    {lines}\n  ]\n}}\n')
        os.replace(temporary, path)
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
        for row in read(folder() / f"{arch}.json")
        if row["gpu"] in here
    }
