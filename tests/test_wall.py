"""The wall between the packages: fastpeft takes tensors and facts from peft_kernels through public names alone."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "python" / "fastpeft"
# where a public name may come from; `testing` is for tests of both packages
DOORS = {"peft_kernels", "peft_kernels.dispatch", "peft_kernels.formats", "peft_kernels.testing"}
FILES = sorted(LIBRARY.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of every import in a file, wherever it stands; relative ones as they resolve."""
    package = ("fastpeft", *path.relative_to(LIBRARY).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def test_this_reads_imports_wherever_they_stand(tmp_path: Path) -> None:
    found = set(imports(LIBRARY / "methods" / "lora.py"))
    assert ("fastpeft.methods.fused", "Fused") in found
    assert ("fastpeft.model.combine", "add_weighted_lora") in found or ("peft_kernels", "PreparedCall") in found


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(LIBRARY)) for p in FILES])
def test_only_public_names_of_the_kernels_are_imported(path: Path) -> None:
    import peft_kernels

    for module, name in imports(path):
        if module.split(".")[0] != "peft_kernels":
            continue
        assert module in DOORS, f"{module} is not public: export what is needed from peft_kernels"
        if module == "peft_kernels" and name is not None:
            public = {*peft_kernels.__all__, *(door.partition(".")[2] for door in DOORS)}
            assert name in public, f"peft_kernels.{name} is not in its __all__"
        elif name is not None:
            assert not name.startswith("_"), f"{module}.{name} is private"
            assert hasattr(importlib.import_module(module), name)


def test_every_public_name_is_there_and_documented() -> None:
    import peft_kernels

    for name in peft_kernels.__all__:
        value = getattr(peft_kernels, name)
        assert isinstance(value, tuple | float) or value.__doc__, f"peft_kernels.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        peft_kernels.nothing  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(LIBRARY)) for p in FILES])
def test_no_memory_is_read_and_no_operator_called_past_dispatch(path: Path) -> None:
    """`data_ptr` tells whether two tensors share a place: it is compared, or looked up, and never calculated with."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    compared = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) or (isinstance(node, ast.Call) and _is_add(node))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("string_at", "memmove", "_cdata", "from_address", "_call"), node.attr
            if node.attr == "data_ptr":
                assert id(node) in compared, f"line {node.lineno} uses an address"


def _is_add(node: ast.Call) -> bool:
    """`seen.add(tensor.data_ptr())`, a set of places."""
    return isinstance(node.func, ast.Attribute) and node.func.attr == "add"
