"""Files that a command makes: it writes them, or with `--check` says which of them are out of date."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def write_or_check(made: Mapping[Path, str]) -> int:
    """Write the texts of `made` to their files; with `--check` on the command line compare them. Returns its status."""
    if "--check" in sys.argv:
        old = [p.name for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
        print(f"out of date: {', '.join(old)}; run python tools/{Path(sys.argv[0]).name}" if old else "up to date")
        return 1 if old else 0
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0
