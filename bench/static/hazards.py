"""Products of sm_90 whose left operand lies in registers, and what writes to those too early.

`HGMMA` is asynchronous: it reads its registers until `WARPGROUP.DEPBAR.LE gsb0, N` has waited for it, that is until
at most N groups that began later are under way (`gsb0` at the end of an HGMMA closes a group). ptxas before 13.3 may
give such a register to another value meanwhile (triton-lang/triton#11781).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from . import loops

_FROM_REGISTERS = re.compile(r"\bHGMMA\S*\s+R\d+, R(\d+)")
_READ = 4  # registers of a thread that hold its share of a left operand, whatever the type
_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE\s+gsb0, (0x[0-9a-f]+)")
_DESTINATION = re.compile(r"(?:@!?U?P\w+ )?([A-Z]\S*)\s+(?:!?U?P\w+, )*R(\d+)\b")
_NO_RESULT = re.compile(r"\w*SETP|R2P\b|PLOP|BR|RET|BAR|WARPSYNC|NANOSLEEP")  # or predicates
_MANY = 8  # groups under way; no code has as many


def overwritten(code: Sequence[str], labels: dict[str, int]) -> int:
    """Products with a left operand in registers that on some path are written to before the product has ended."""
    after = loops.successors(code, labels)
    return sum(
        _is_overwritten(code, after, i, int(m[1])) for i, text in enumerate(code) if (m := _FROM_REGISTERS.search(text))
    )


def _is_overwritten(code: Sequence[str], after: Sequence[Sequence[int]], start: int, first: int) -> bool:
    operand = set(range(first, first + _READ))
    closed = int("gsb0" in code[start])  # groups closed since the product began, its own included
    waiting = [(i, closed) for i in after[start]]
    seen = set(waiting)
    while waiting:
        i, closed = waiting.pop()
        text = code[i]
        if m := _WAIT.search(text):
            if closed > int(m[1], 16):
                continue
        elif "HGMMA" in text:  # in order behind the product, whatever it writes
            closed = min(_MANY, closed + int("gsb0" in text))
        elif operand & written(text):
            return True
        for state in ((to, closed) for to in after[i]):
            if state not in seen:
                seen.add(state)
                waiting.append(state)
    return False


def written(text: str) -> set[int]:
    """The vector registers that an instruction writes to."""
    m = _DESTINATION.match(text)
    if m is None or _NO_RESULT.match(m[1]):  # else a store, or a result in a uniform register
        return set()
    return set(range(int(m[2]), int(m[2]) + _width(m[1].split("."))))


def _width(op: list[str]) -> int:
    """Registers of a result, by its opcode."""
    name, suffixes = op[0], set(op[1:])
    if "256" in suffixes:
        return 8
    if "128" in suffixes or (name == "LDSM" and "4" in suffixes) or (name == "HMMA" and "F32" in suffixes):
        return 4
    wide = suffixes & {"64", "WIDE"} or (name == "LDSM" and "2" in suffixes) or op[1:2] == ["F64"]
    return 2 if wide or name in ("HMMA", "DADD", "DMUL", "DFMA") or (name == "CS2R" and "32" not in suffixes) else 1
