"""The rooms of python/fastpeft, floor by floor, and the imports between them, as the tree has them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fastpeft"
KERNELS = "peft_kernels"
PUBLIC = "fastpeft"  # the files at the top of the package: its public names
# From the ground up: a room knows only those before it.
FLOORS = (
    KERNELS, "files", "config", "weights", "methods", "layer", "inject", "saving", "model", "recipes", "pool", "compat",
    PUBLIC, "apps",
)  # fmt: skip


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module of fastpeft, by its path below the package: its folder; PUBLIC for files at the top."""
    return parts[0] if len(parts) > 1 else PUBLIC


def modules(package: Path) -> dict[tuple[str, ...], Path]:
    """Files by their module's name below the package; a folder's `__init__` has the folder's name and a last ''."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[(*parts[:-1], "") if parts[-1] == "__init__" else parts] = path
    return found


def targets(module: tuple[str, ...], path: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports wherever the import stands: ("fastpeft", "config", "types"), ("peft_kernels",), ..."""
    package = ("fastpeft", *module[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def arrows(package: Path = PACKAGE) -> Counter[tuple[str, str]]:
    """(room, room that it imports from) -> number of imported names, between different rooms. `from .. import config`
    imports a room, `from fastpeft import LoraConfig` the public names."""
    files = modules(package)
    found: Counter[tuple[str, str]] = Counter()
    for module, path in files.items():
        source = room_of(module)
        for target in targets(module, path):
            if target[0] == KERNELS:
                found[source, KERNELS] += 1
            elif target[0] == "fastpeft":
                known = target[1:]
                while known and known not in files and (*known, "") not in files:
                    known = known[:-1]  # the last word is a name in the module, or there is no such module
                room = room_of((*known, "") if (*known, "") in files else known)
                if room != source:
                    found[source, room] += 1
    return found


def sentence(package: Path, room: str) -> str:
    """The first paragraph of a room's docstring."""
    init = package / room / "__init__.py"
    text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init.exists() else None
    return " ".join((text or "").split("\n\n")[0].split())


def lines(package: Path) -> Counter[str]:
    """Lines of Python by room."""
    found: Counter[str] = Counter()
    for module, path in modules(package).items():
        found[room_of(module)] += len(path.read_text(encoding="utf-8").splitlines())
    return found


def unplaced(package: Path = PACKAGE) -> list[str]:
    """Folders of the package with Python in them that FLOORS does not name."""
    return sorted({room_of(m) for m in modules(package)} - set(FLOORS))
