"""Draw docs/img/rooms.svg, the rooms of python/fastpeft and their imports: `python tools/rooms_picture.py [--check]`.

Rooms are floors, the ground at the bottom. An arrow goes from a room to one that it imports from; the more names it
imports, the darker. Lines of Python are rounded to hundreds, so that a small change leaves the picture as it is.
"""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from html import escape
from pathlib import Path

from floors import FLOORS, KERNELS, PACKAGE, PUBLIC, ROOT, arrows, lines, sentence, unplaced
from made_files import write_or_check

TARGET = ROOT / "docs" / "img" / "rooms.svg"
SAID = {
    KERNELS: "Tensors in, tensors out: ops, each with its backends. It knows no modules, no names, no files.",
    PUBLIC: "The public names: what the applications import.",
}
FONT = "-apple-system,BlinkMacSystemFont,'Segoe UI','Noto Sans','DejaVu Sans',Helvetica,Arial,sans-serif"
INK, MUTED, EDGE, UP, BAR = "#1f2328", "#59636e", "#d1d9e0", "#cf222e", "#a8c7ec"
GROUND, PACKAGES, STANDING, APPS = "#fff3d6", "#eaf3ff", "#e9f7ec", "#f6edff"
FILL = {KERNELS: GROUND, "recipes": STANDING, "pool": STANDING, "compat": STANDING, PUBLIC: "#ffffff", "apps": APPS}
# pixels
LEFT, TOP, WIDE, HIGH, GAP, ROOM_FOR_ARROWS = 12, 14, 640, 46, 10, 230
BAR_AT, BAR_WIDE, WRAP = 478, 100, 50
SHADES = ((12, "#33669e", 2.2), (4, "#6f9bc8", 1.6), (0, "#b4cbe4", 1.2))  # from so many names on: colour, width


def hundreds(count: int) -> int:
    return max(100, round(count, -2))


def floor(room: str, y: int, said: str, count: int | None, longest: int) -> list[str]:
    middle = y + HIGH / 2
    style = ' stroke-dasharray="5 4"' if room == PUBLIC else ""
    parts = [
        f'<rect x="{LEFT}" y="{y}" width="{WIDE}" height="{HIGH}" rx="6" fill="{FILL.get(room, PACKAGES)}" '
        f'stroke="{EDGE}"{style}/>',
        f'<text x="{LEFT + 14}" y="{middle + 5:g}" font-size="15" font-weight="600" fill="{INK}">{escape(room)}</text>',
    ]
    told = textwrap.wrap(said, WRAP)
    if len(told) > 2:
        told = [told[0], textwrap.shorten(" ".join(told[1:]), WRAP, placeholder=" …")]
    for i, line in enumerate(told):
        at = middle + 4.5 + (i - (len(told) - 1) / 2) * 15
        parts.append(f'<text x="{LEFT + 138}" y="{at:g}" font-size="12" fill="{MUTED}">{escape(line)}</text>')
    if count is not None:
        wide = BAR_WIDE * count / longest
        parts += [
            f'<rect x="{LEFT + BAR_AT}" y="{middle - 4:g}" width="{wide:.0f}" height="8" rx="2" fill="{BAR}"/>',
            f'<text x="{LEFT + WIDE - 12}" y="{middle + 4.5:g}" font-size="12" text-anchor="end" fill="{MUTED}">'
            f"{count:,}</text>",
        ]
    return parts


def arc(y_from: float, y_to: float, count: int, farthest: float) -> str:
    """A half ellipse on the right: the farther apart two rooms are, the farther out it goes."""
    colour, wide = next((c, w) for least, c, w in SHADES if count >= least)
    if y_to < y_from:
        colour, wide = UP, 2.2
    x = LEFT + WIDE
    out = 30 + (ROOM_FOR_ARROWS - 60) * (abs(y_to - y_from) / farthest) ** 0.75
    bend = x + out * 4 / 3
    path = f"M{x + 1} {y_from:.1f} C{bend:.1f} {y_from:.1f} {bend:.1f} {y_to:.1f} {x + 7} {y_to:.1f}"
    head = f"M{x + 2} {y_to:.1f} l8 -3.6 v7.2 z"
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{wide}"/>'
        f'<path d="{head}" fill="{colour}"/>'
    )


def places(
    found: Counter[tuple[str, str]], shown: list[str], tops: dict[str, int]
) -> dict[tuple[str, str], list[float]]:
    """The two heights of each arrow: at a room, those that go far leave and arrive nearest to its middle."""
    rank = {room: i for i, room in enumerate(shown)}
    at: dict[tuple[str, str], list[float]] = {edge: [0.0, 0.0] for edge in found}
    for room in shown:
        ends = [(edge, end) for edge in found for end in (0, 1) if edge[end] == room]
        # from the top of the room down: to rooms above (the nearest first), then to rooms below (the farthest first)
        above = sorted((e for e in ends if rank[e[0][1 - e[1]]] > rank[room]), key=lambda e: rank[e[0][1 - e[1]]])
        below = sorted((e for e in ends if rank[e[0][1 - e[1]]] < rank[room]), key=lambda e: rank[e[0][1 - e[1]]])
        step = (HIGH - 12) / max(1, len(ends) - 1)
        for i, (edge, end) in enumerate([*above, *below]):
            at[edge][end] = tops[room] + (6 + i * step if len(ends) > 1 else HIGH / 2)
    return at


def picture(package: Path = PACKAGE, kernels: Path = ROOT / KERNELS) -> str:
    strange = unplaced(package)
    if strange:
        raise SystemExit(f"FLOORS in tools/floors.py does not name {', '.join(strange)} of {package.name}")
    count = lines(package)
    shown = [room for room in FLOORS if room == KERNELS or count[room]]
    # what the top of the package imports is every room, by design; the lines of it would hide the others
    found = Counter({e: n for e, n in arrows(package).items() if e[0] != PUBLIC})
    count[KERNELS] = sum(lines(kernels).values())
    size = {room: hundreds(n) for room, n in count.items()}
    size.pop(PUBLIC, None)
    tops = {room: TOP + i * (HIGH + GAP) for i, room in enumerate(reversed(shown))}
    total = TOP + len(shown) * (HIGH + GAP) + 26
    wide = LEFT + WIDE + ROOM_FOR_ARROWS
    heights = places(found, shown, tops)
    farthest = max((abs(a - b) for a, b in heights.values()), default=1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {total}" width="{wide}" height="{total}" '
        f'font-family="{FONT}">',
        "<title>The rooms of fastpeft, floor by floor, and what each imports from</title>",
        f'<rect width="{wide}" height="{total}" fill="#ffffff"/>',
    ]
    for edge in sorted(found, key=lambda e: (found[e], e)):
        parts.append(arc(*heights[edge], found[edge], farthest))
    for room in shown:
        said = SAID.get(room) or sentence(package, room)
        parts += floor(room, tops[room], said, size.get(room), max(size.values()))
    parts.append(
        f'<text x="{LEFT}" y="{total - 12}" font-size="12" fill="{MUTED}">bars: lines of Python; arrows: imports, '
        "darker where there are more; a room knows only those below it</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({TARGET: picture()}))
