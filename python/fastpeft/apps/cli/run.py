"""`fastpeft run`: a Python program, run as Python runs it, with fastpeft in the place of PEFT or PEFT patched.

This file needs neither typer nor torch, and the program finds nothing of it: `sys.argv`, `sys.path[0]`, `__main__`, the
exit code and tracebacks are those of `python SCRIPT` and `python -m MODULE`.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import multiprocessing.spawn
import os
import pkgutil
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

import fastpeft

USAGE = "usage: fastpeft run [--patch] SCRIPT ARGS...  or  fastpeft run [--patch] -m MODULE ARGS..."


def main(args: Sequence[str]) -> None:
    """Run what the arguments of `fastpeft run` name; everything after SCRIPT or MODULE is the program's own."""
    options = set()
    while args and args[0] in ("--patch", "-m"):
        options.add(args[0])
        args = args[1:]
    if not args or (args[0].startswith("-") and args[0] != "-"):
        _fail(f"{f'no such option: {args[0]}' if args else 'a SCRIPT or -m MODULE is missing'}\n{USAGE}")
    execute(args, module="-m" in options, patch="--patch" in options)


def execute(command: Sequence[str], module: bool = False, patch: bool = False) -> None:
    """Run a program as `__main__`. command: a script (or a module's name, if `module`) and its arguments.

    patch: call `fastpeft.patch()` before it, so that it runs on PEFT itself; else `fastpeft.as_peft()`.
    """
    how = "patch" if patch else "as_peft"
    try:
        prepare(how)
    except (ImportError, RuntimeError, ValueError) as error:
        _fail(str(error), 1)
    name, spec = command[0], None
    sys.argv[:] = ["-m" if module else name, *command[1:]]
    if module:
        _set_first_path(os.getcwd())
        spec = _module_spec(name)
    elif os.path.isdir(name) or zipfile.is_zipfile(name):
        _set_first_path(name)
        if (spec := PathFinder.find_spec("__main__", [name])) is None:
            _fail(f"can't find '__main__' module in {name!r}", 1)
    else:
        _set_first_path(os.path.dirname(os.path.realpath(name)))
    program: Any = ModuleType("__main__")
    program.__builtins__ = builtins
    try:
        code = _script(name, program) if spec is None else _module(spec, program)
    except SyntaxError as error:
        sys.excepthook(SyntaxError, error.with_traceback(None), None)
        raise SystemExit(1) from None
    if module:
        sys.argv[0] = program.__file__
    sys.excepthook = _show_from_the_program
    sys.modules["__main__"] = program
    exec(code, program.__dict__)


def prepare(how: str) -> None:
    """Call `fastpeft.as_peft()` or `fastpeft.patch()`, here and in every process that multiprocessing will spawn.

    Those unpickle what they need to know before they import anything of the program, and the call is a part of that.
    """
    getattr(fastpeft, how)()
    given = multiprocessing.spawn.get_preparation_data
    if getattr(given, "prepares", None) != how:

        def with_call(name: str) -> dict[str, Any]:
            return {"fastpeft": _Prepare(how), **given(name)}

        with_call.prepares = how  # type: ignore[attr-defined]
        multiprocessing.spawn.get_preparation_data = with_call


class _Prepare:
    """`prepare(how)`, called where this is unpickled."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return prepare, (self.how,)


def _set_first_path(folder: str) -> None:
    """Put the program's folder where Python puts it, instead of the folder that Python put there for us."""
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = folder


def _module_spec(name: str) -> ModuleSpec:
    """The spec of what `python -m NAME` runs: the module, or a package's `__main__`."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the package is there, and lacks another
        spec = None
    if spec is None:
        _fail(f"No module named {name}", 1)
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
        if spec is None:
            _fail(f"No module named {name}.__main__; {name!r} is a package and cannot be directly executed", 1)
    return spec


def _module(spec: ModuleSpec, program: Any) -> CodeType:
    """The code of a module, whose names `program` gets."""
    loader: Any = spec.loader
    code = loader.get_code(spec.name) if hasattr(loader, "get_code") else None
    if code is None:
        _fail(f"No code object available for {spec.name}", 1)
    program.__spec__, program.__loader__, program.__package__ = spec, spec.loader, spec.parent
    program.__file__, program.__cached__ = spec.origin, spec.cached
    return code  # type: ignore[no-any-return]


def _script(name: str, program: Any) -> CodeType:
    """The code of a script, compiled or not, whose names `program` gets."""
    path = os.path.abspath(name)
    try:
        with io.open_code(path) as file:
            code = pkgutil.read_code(file)  # type: ignore[attr-defined]
            if code is None:
                file.seek(0)
                code = compile(file.read(), path, "exec", dont_inherit=True)
    except OSError as error:
        _fail(f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}")
    program.__file__, program.__cached__ = path, None
    program.__package__, program.__loader__ = None, SourceFileLoader("__main__", path)
    return code  # type: ignore[no-any-return]


def _show_from_the_program(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception as Python does, without the frames that led to the program."""
    inner = trace
    while inner is not None and inner.tb_frame.f_globals is not sys.modules["__main__"].__dict__:
        inner = inner.tb_next
    inner = trace if inner is None else inner
    sys.__excepthook__(kind, error.with_traceback(inner), inner)


def _fail(problem: str, code: int = 2) -> NoReturn:
    print(f"fastpeft run: {problem}", file=sys.stderr)
    raise SystemExit(code)
