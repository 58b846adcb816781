"""The rooms of python/fastpeft, floor by floor, and the imports between them, as the tree has them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fastpeft"
KERNELS = "peft_kernels"
PUBLIC = "fastpeft"  # the files at the top of the package: its public names
# From the ground up: a room knows only those before it.
FLOORS = (
    KERNELS, "files", "config", "weights", "networks", "methods", "layer", "families", "prompts", "inject", "saving",
    "model", "recipes", "pool", "compat", PUBLIC, "apps",
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


def targets(module: tuple[str, ...], path: Path, name: str = PUBLIC) -> Iterator[tuple[tuple[str, ...], int]]:
    """Imports of a file of the package `name`, wherever they stand, with their lines: (("fastpeft", "config"), 12)."""
    package = (name, *module[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((tuple(alias.name.split(".")), node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from (((*base, alias.name), node.lineno) for alias in node.names)


@dataclass(frozen=True)
class Arrow:
    """An imported name: a module, the module that it comes from, the line. Names are paths below the package, as those
    of `modules`; `target` is (KERNELS, ...) where fastpeft imports from there."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    line: int

    @property
    def room(self) -> str:
        return KERNELS if self.target[0] == KERNELS else room_of(self.target)

    def __str__(self) -> str:
        source, target = (".".join(filter(None, module)) or PUBLIC for module in (self.source, self.target))
        return f"{source}:{self.line} imports {target}"


def file_arrows(package: Path = PACKAGE, name: str = PUBLIC) -> Iterator[Arrow]:
    """Imports between the files of a package, and what of it imports peft_kernels. `from .. import config` imports a
    room, `from fastpeft import LoraConfig` the public names."""
    files = modules(package)
    for module, path in files.items():
        for target, line in targets(module, path, name):
            if target[0] == name:
                known = target[1:]
                while known and known not in files and (*known, "") not in files:
                    known = known[:-1]  # the last word is a name in the module, or there is no such module
                found = known if known in files else (*known, "")
                if found != module:
                    yield Arrow(module, found, line)
            elif target[0] == KERNELS:
                yield Arrow(module, target, line)


def arrows(package: Path = PACKAGE) -> Counter[tuple[str, str]]:
    """(room, room that it imports from) -> number of imported names, between different rooms."""
    rooms = ((room_of(a.source), a.room) for a in file_arrows(package))
    return Counter((source, target) for source, target in rooms if source != target)


def circles(edges: Iterator[Arrow]) -> list[list[str]]:
    """Groups of files that reach each other by imports, each sorted; the strongly connected parts, by Kosaraju."""
    after: dict[str, set[str]] = {}
    before: dict[str, set[str]] = {}
    for edge in edges:
        source, target = (".".join(module).rstrip(".") for module in (edge.source, edge.target))
        after.setdefault(source, set()).add(target)
        before.setdefault(target, set()).add(source)

    def leave(start: str, graph: dict[str, set[str]], seen: set[str]) -> Iterator[str]:
        """Depth first; files in the order in which they are left."""
        seen.add(start)
        path = [(start, iter(sorted(graph.get(start, ()))))]
        while path:
            at, rest = path[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                path.pop()
                yield at
            else:
                seen.add(following)
                path.append((following, iter(sorted(graph.get(following, ())))))

    seen: set[str] = set()
    order = [left for start in sorted(after) if start not in seen for left in leave(start, after, seen)]
    seen = set()
    groups = [sorted(leave(start, before, seen)) for start in reversed(order) if start not in seen]
    return [group for group in groups if len(group) > 1]


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
