"""The rooms of fastpeft: which knows which, held over every import wherever it stands, lazy ones included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from floors import FLOORS, KERNELS, PACKAGE, PUBLIC, Arrow, circles, file_arrows, room_of, sentence

ROOT = Path(__file__).resolve().parent.parent
ROOMS = tuple(room for room in FLOORS if room not in (KERNELS, PUBLIC))
ARROWS = list(file_arrows())
# Rooms that are made to be imported from outside, besides the public names.
OPEN = {"apps", "pool"}


def test_the_top_level_holds_rooms_alone() -> None:
    files = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert files == {"__init__.py", "__main__.py", "testing.py", "py.typed"}
    assert {p.relative_to(PACKAGE).parts[0] for p in PACKAGE.glob("*/**/*.py")} == set(ROOMS)


def test_no_room_knows_one_above_it() -> None:
    floor = {room: i for i, room in enumerate(FLOORS)}
    # the names at the top lead everywhere, each when it is asked for
    upward = [a for a in ARROWS if room_of(a.source) != PUBLIC and floor[a.room] > floor[room_of(a.source)]]
    assert list(map(str, upward)) == []


def test_apps_stand_on_public_names() -> None:
    inside = [a for a in ARROWS if room_of(a.source) == "apps" and a.room not in (PUBLIC, KERNELS, *OPEN)]
    assert list(map(str, inside)) == []


@pytest.mark.parametrize("folder", ["python/fastpeft", "peft_kernels", "bench"])
def test_no_circle_of_files(folder: str) -> None:
    package = ROOT / folder
    own = (a for a in file_arrows(package, package.name) if package.name == KERNELS or a.target[0] != KERNELS)
    assert circles(own) == []


def test_circles_are_found() -> None:
    pairs = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d"), ("e", "a"), ("f", "g"), ("g", "h"), ("h", "f")]
    assert sorted(circles(Arrow((s,), (t,), 1) for s, t in pairs)) == [["b", "c"], ["f", "g", "h"]]


def test_the_architecture_has_a_row_for_each_room() -> None:
    """`docs/architecture.md` has exactly the rooms that there are, each with the sentence of its `__init__`."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `python/fastpeft/([\w/]+)/` \| (.+?) \|$", text, flags=re.M))
    rooms = {p.parent.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*/__init__.py")}
    assert list(rows) == sorted(rows, key=lambda room: (FLOORS.index(room.split("/")[0]), room))
    assert rows == {room: sentence(PACKAGE, room) for room in rooms}
