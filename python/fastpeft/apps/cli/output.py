"""How commands speak: results on stdout (a table or one JSON document), all else on stderr, errors in one line."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from ..training.stop import Interrupted, Terminated, handled, terminate

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; progress goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Cached = Annotated[
    bool, typer.Option("--cache-quantized", help="Keep the quantised base; later runs open it by mapping, in a moment.")
]
USER_ERROR, INTERNAL_ERROR = 1, 3
# What libraries raise for bad input; anything else is a defect and says so.
_EXPECTED = (ValueError, OSError, ImportError, NotImplementedError)


class Session:
    """One command's output. ``emit`` is called once, with the result."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout

    def emit(self, result: dict[str, Any], human: Callable[[], None]) -> None:
        """Print ``result`` as JSON with ``--json``, else run ``human``."""
        if self.as_json:
            print(json.dumps(result, indent=2), file=self._stdout, flush=True)
        else:
            human()


@contextlib.contextmanager
def session(as_json: bool, debug: bool) -> Iterator[Session]:
    """Run a command: with ``--json`` only the result reaches stdout; an exception becomes one line and a code."""
    current = Session(as_json)
    try:
        out = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with handled(signal.SIGTERM, terminate), out:
            yield current
    except (typer.Exit, typer.Abort):
        raise
    except (Interrupted, Terminated) as error:
        _fail(current, error.problem, error.fix, error.exit_code)
    except KeyboardInterrupt:
        _fail(current, Interrupted().problem, Interrupted().fix, Interrupted.exit_code)
    except Exception as error:
        if debug:
            raise
        problem, fix, code = explain(error)
        _fail(current, problem, fix, code)


def explain(error: Exception) -> tuple[str, str, int]:
    """(what was wrong, what to do, exit code)."""
    if hasattr(error, "problem") and hasattr(error, "fix"):
        return error.problem, error.fix, USER_ERROR
    text = " ".join(str(error).split()) or type(error).__name__
    name = type(error).__name__
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory", "lower batch_size or max_length, or set gradient_checkpointing=true", USER_ERROR
    if isinstance(error, _EXPECTED) or name in ("BackendUnavailable", "NativeError"):
        if isinstance(error, ImportError) and error.name:
            return (
                text,
                f"pip install {error.name.partition('.')[0]}; `fastpeft doctor` shows what is missing",
                USER_ERROR,
            )
        return text, "", USER_ERROR
    return f"unexpected {name}: {text}", "this is a defect; run again with --debug for the traceback", INTERNAL_ERROR


def _fail(current: Session, problem: str, fix: str, code: int) -> None:
    print(f"error: {problem}; {fix}" if fix else f"error: {problem}", file=sys.stderr)
    if current.as_json:
        print(json.dumps({"error": {"problem": problem, "fix": fix}}, indent=2), file=current._stdout, flush=True)
    raise typer.Exit(code)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: bool = False) -> None:
    """Print a table on stdout. lines: between the rows, too."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", title_style="bold", show_lines=lines)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # Text: brackets in data are not markup
    console = Console()
    if not console.is_terminal and console.width < 100:
        console = Console(width=120)  # piped to a file: do not fold at 80
    console.print(drawn)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr; yields the function that moves it: (what is worked on, how many are done, of how many)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("")

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def utf8_streams() -> None:
    """Never die on a character that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
