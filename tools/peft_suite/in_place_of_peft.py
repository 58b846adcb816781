"""A plugin of pytest, `-p in_place_of_peft`: `import peft` is fastpeft, before anything else is imported.

Names that the tests import and fastpeft lacks are stand-ins, so that a file that needs one can be collected all the
same; a case that uses one fails. With PEFT_SUITE_STUBS=1 it is skipped, as one that has it among its parameters.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastpeft
import pytest

fastpeft.as_peft()

SKIPS = os.environ.get("PEFT_SUITE_STUBS") == "1"
missing: set[str] = set()
running = False


class _Stub(type):
    """The class of stand-ins, each of which is a class, as most names that tests import are."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._use_or(lambda: super(_Stub, cls).__call__())

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._use_or(lambda: stub(f"{cls.__doc__}.{name}"))

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __contains__(cls, item: object) -> bool:
        return False

    def __instancecheck__(cls, instance: object) -> bool:
        return bool(cls._use_or(lambda: False))

    def _use_or(cls, make: Any) -> Any:
        if running:
            (pytest.skip if SKIPS else pytest.fail)(f"not there: {cls.__doc__}")
        return make()


def stub(name: str) -> Any:
    return _Stub(name.rpartition(".")[2], (), {"__doc__": name})


def _name_of_stub(value: Any) -> str | None:
    """The name of a stand-in that is, or is in, a parameter of a test."""
    if isinstance(value, _Stub) or isinstance(type(value), _Stub):
        return value.__doc__
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((name for item in inner if (name := _name_of_stub(item))), None)


def _module(name: str) -> types.ModuleType:
    """A module of PEFT's by its name, made where fastpeft has none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        missing.add(name)
        parent, _, last = name.rpartition(".")
        sys.modules[name] = module = types.ModuleType(name)
        setattr(_module(parent), last, module)
        return module


def _fill(path: Path) -> None:
    """Put a stand-in where a test file imports what is missing."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
            module = _module(node.module)
            for alias in node.names:
                try:
                    getattr(module, alias.name)
                except (AttributeError, ImportError, NotImplementedError):
                    missing.add(f"{node.module}.{alias.name}")
                    setattr(module, alias.name, stub(f"{node.module}.{alias.name}"))


def pytest_configure(config: pytest.Config) -> None:
    for argument in config.args:
        path = Path(argument.partition("::")[0])
        for each in (path, *path.parent.glob("testing_*.py")) if path.is_file() else ():
            _fill(each)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if SKIPS else ():
        if name := _name_of_stub(getattr(getattr(item, "callspec", None), "params", {})):
            item.add_marker(pytest.mark.skip(reason=f"not there: {name}"))


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Iterator[None]:
    global running
    running = True
    yield
    running = False


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if missing:
        terminalreporter.write_line(f"not there: {', '.join(sorted(missing))}")
