"""Names of PEFT's that an installed package uses, read from its sources: nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


def uses(package: str) -> dict[str, set[str]]:
    """`peft.x.y` -> the files (below the package) that import it or reach it as an attribute; {} if not installed."""
    spec = find_spec(package)
    found: dict[str, set[str]] = {}
    for root in spec.submodule_search_locations or () if spec else ():
        for file in Path(root).rglob("*.py"):
            text = file.read_text(encoding="utf-8", errors="replace")
            for name in _names(text) if "peft" in text else ():
                found.setdefault(name, set()).add(file.relative_to(root).as_posix())
    return found


def _names(text: str) -> Iterator[str]:
    tree = ast.parse(text)
    bound = {}  # local name -> the module of PEFT's that it is
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "peft":
                    yield alias.name
                    bound[alias.asname or "peft"] = alias.name if alias.asname else "peft"
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").partition(".")[0] == "peft":
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in bound and parts:
            yield ".".join([bound[node.id], *reversed(parts)])
