"""The command line ``fastpeft``. Importing it is cheap: torch and all else heavy is imported inside the commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``fastpeft`` and ``python -m fastpeft``."""
    if sys.argv[1:2] == ["run"] and sys.argv[2:3] not in ([], ["-h"], ["--help"]):
        from . import run  # not through typer: nothing stands between Python and the program

        run.main(sys.argv[2:])
        return
    try:
        from .app import app
    except ImportError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        print(f"error: the command line needs the package {error.name}; pip install typer rich", file=sys.stderr)
        raise SystemExit(1) from None
    app()
