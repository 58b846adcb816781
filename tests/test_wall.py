"""The wall between the packages: fastpeft takes tensors and facts from peft_kernels through public names alone."""

from __future__ import annotations

import ast
import importlib

import pytest
from floors import KERNELS, PACKAGE, modules, targets

import peft_kernels

# Modules whose public names may be imported, besides those of `peft_kernels.__all__`; `testing` is for tests of both.
DOORS = {"dispatch", "formats", "testing"}
FILES = modules(PACKAGE)


@pytest.mark.parametrize("module", FILES, ids=[".".join(filter(None, m)) or "fastpeft" for m in FILES])
def test_only_public_names_of_the_kernels_are_imported(module: tuple[str, ...]) -> None:
    for target, line in targets(module, FILES[module]):
        if target[0] != KERNELS or len(target) == 1:
            continue
        where = f"line {line}: {'.'.join(target)}"
        if target[1] in DOORS:
            door = importlib.import_module(".".join(target[:2]))
            assert all(hasattr(door, name) and not name.startswith("_") for name in target[2:]), f"{where} is private"
        else:
            assert target[1] in peft_kernels.__all__, f"{where} is not public: export what is needed"
            assert len(target) == 2, f"{where} reaches into a module"


def test_no_raw_memory() -> None:
    """`data_ptr` tells whether tensors share a place; nothing reads what is there, or calls an operator's body."""
    for path in FILES.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert not names & {"_call", "string_at", "from_address", "_cdata", "memmove"}, path


def test_every_public_name_is_there_and_documented() -> None:
    for name in peft_kernels.__all__:
        value = getattr(peft_kernels, name)
        assert isinstance(value, tuple | float) or value.__doc__, f"peft_kernels.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        peft_kernels.nothing  # noqa: B018
