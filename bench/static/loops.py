"""Natural loops of a listing: machine code has its slow paths out of line, so a backward branch alone makes no loop."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def _leaves(text: str) -> tuple[bool, bool]:
    """(whether the instruction jumps or ends, whether control may also go on to the next)."""
    words = text.split()
    conditional = words[0].startswith("@")
    op = words[1] if conditional and len(words) > 1 else words[0]
    if op.startswith(("EXIT", "RET", "BRX", "JMX", "KILL")):
        return True, conditional
    if op.startswith(("BRA", "JMP")):
        # BRA.U and BRA.DIV take a condition of their own as an operand
        return True, conditional or bool(re.search(r"BRA(\.\w+)*\s+!?U?P\d|BRA\.DIV|BRA\.CONV", text))
    return False, True


def _blocks(code: Sequence[str], labels: dict[str, int]) -> tuple[list[int], list[list[int]]]:
    """(where each block of straight code begins, the blocks that may follow it)."""
    starts = {0, *(i for i in labels.values() if i < len(code))}
    starts |= {i + 1 for i, text in enumerate(code) if _leaves(text)[0] and i + 1 < len(code)}
    heads = sorted(starts)
    block_of = {first: n for n, first in enumerate(heads)}
    after: list[list[int]] = []
    for n, end in enumerate([*heads[1:], len(code)]):
        jumps, goes_on = _leaves(code[end - 1])
        found = [n + 1] if goes_on and n + 1 < len(heads) else []
        if jumps and (m := _TARGET.search(code[end - 1])) and labels.get(m[1], len(code)) < len(code):
            found.append(block_of[labels[m[1]]])
        after.append(found)
    return heads, after


def successors(code: Sequence[str], labels: dict[str, int]) -> list[list[int]]:
    """For each instruction those that may come next."""
    if not code:
        return []
    heads, after = _blocks(code, labels)
    found = [[i + 1] for i in range(len(code))]
    for end, following in zip([*heads[1:], len(code)], after, strict=True):
        found[end - 1] = [heads[n] for n in following]
    return found


def loops(code: Sequence[str], labels: dict[str, int]) -> list[tuple[int, ...]]:
    """Indices of the instructions of each natural loop: of all paths from a loop's head back to it."""
    if not code:
        return []
    heads, after = _blocks(code, labels)
    ends = [*heads[1:], len(code)]
    dominators = _dominators(after)
    before: list[list[int]] = [[] for _ in heads]
    for n, found in enumerate(after):
        for to in found:
            before[to].append(n)
    bodies: dict[int, set[int]] = {}
    for n, found in enumerate(after):
        for head in found:
            if head in dominators[n]:  # a back edge
                body = bodies.setdefault(head, {head})
                waiting = [n]
                while waiting:
                    b = waiting.pop()
                    if b not in body:
                        body.add(b)
                        waiting.extend(before[b])
    return [tuple(i for b in sorted(body) for i in range(heads[b], ends[b])) for body in bodies.values()]


def _dominators(after: list[list[int]]) -> list[set[int]]:
    """Blocks that lie on every path from the first one; of what no path reaches only itself."""
    before: list[list[int]] = [[] for _ in after]
    reached, waiting = {0}, [0]
    while waiting:
        for to in after[waiting.pop()]:
            if to not in reached:
                reached.add(to)
                waiting.append(to)
    for n in reached:
        for to in after[n]:
            before[to].append(n)
    found = [set(reached) if n in reached else {n} for n in range(len(after))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for n in sorted(reached - {0}):
            new = {n} | set.intersection(*(found[b] for b in before[n]))
            changed |= new != found[n]
            found[n] = new
    return found
