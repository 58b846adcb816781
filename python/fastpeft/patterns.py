"""Regular expressions from configurations, bounded in length and in time.

A configuration may come from a stranger, and `re` can take exponential time. A pattern whose structure allows only
little backtracking is matched in this process. Any other runs in a short-lived Python process that the system ends
after half a second of processor time; that is an error which names the pattern.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .config import PeftError

if sys.version_info >= (3, 11):
    from re import _constants as _sre
    from re import _parser
else:
    import sre_constants as _sre
    import sre_parse as _parser

MAX_LENGTH = 1000
CPU_SECONDS = 0.5
# A backstop for a machine so busy that half a second of processor time takes long.
WALL_SECONDS = 20.0

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]*")

# Of expressions that are matched in this process in one go; more than these share the other process's budget.
MAX_HERE = 64

# ITIMER_PROF counts processor time and its signal ends the process inside `re`'s own loop; where it is missing, the
# caller's wall clock ends it.
_WORKER = """
import json, re, sys
try:
    import signal
    signal.setitimer(signal.ITIMER_PROF, %s)
except (ImportError, AttributeError):
    pass
patterns, names = json.loads(sys.stdin.read())
def hits(pattern):
    match = re.compile(pattern).match
    found = ((name, match(name)) for name in names)
    return {name: m.groupdict().get("idx") or "" for name, m in found if m}
print(json.dumps([hits(pattern) for pattern in patterns]))
"""


def is_plain(pattern: str) -> bool:
    """Whether `pattern` is a module name rather than an expression (a dot then stands for a dot)."""
    return _PLAIN.fullmatch(pattern) is not None


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of at most `MAX_LENGTH` characters, or say what is wrong with it."""
    if len(pattern) > MAX_LENGTH:
        raise PeftError(f"a pattern of {len(pattern)} characters: at most {MAX_LENGTH} are accepted")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PeftError(f"{pattern!r} is not a valid regular expression: {error}") from None


def match_names(pattern: str, names: Iterable[str], prefix: str = "", suffix: str = r"\Z") -> dict[str, str]:
    """The names that `prefix + pattern + suffix` matches from their start, with what its group `idx` matched.

    The default suffix makes it a full match. Raises PeftError for a pattern that is malformed, too long or too slow.
    """
    return match_all([pattern], names, prefix, suffix)[0]


def match_all(
    patterns: Sequence[str], names: Iterable[str], prefix: str = "", suffix: str = r"\Z"
) -> list[dict[str, str]]:
    """`match_names` for several patterns, which share one bound."""
    names = list(names)
    whole = [_whole(pattern, prefix, suffix) for pattern in patterns]
    if len(patterns) <= MAX_HERE and all(_backtracks_little(w) for w in whole):
        found = []
        for expression in whole:
            matches = ((name, re.match(expression, name)) for name in names)
            found.append({name: m.groupdict().get("idx") or "" for name, m in matches if m})
        return found
    return _match_in_process(patterns, whole, names)


def _whole(pattern: str, prefix: str, suffix: str) -> str:
    compile_pattern(pattern)
    flags = re.match(r"\(\?[aiLmsux]+\)", pattern)  # these must stand at the start
    start = flags.end() if flags else 0
    whole = f"{pattern[:start]}{prefix}(?:{pattern[start:]}){suffix}"
    try:
        re.compile(whole)
    except re.error:
        raise PeftError(f"{pattern!r} cannot be used as part of a regular expression") from None
    return whole


def hits_of(patterns: Iterable[str], names: Sequence[str]) -> dict[str, Iterable[str]]:
    """The names that each pattern matches, wholly or from a dot on."""
    patterns = list(patterns)
    hits: dict[str, Iterable[str]] = {}
    for pattern in filter(is_plain, patterns):
        hits[pattern] = [n for n in names if n == pattern or n.endswith("." + pattern)]
    # A name may be meant as an expression, its dots for any character, if it is nobody's name.
    others = [p for p in patterns if not hits.get(p) and not p.isidentifier()]
    hits.update(zip(others, match_all(others, names, prefix=r"(?:.*\.)?"), strict=True))
    return hits


def first_match(patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """For each name the value of the first pattern that matches it or a part of it that starts after a dot."""
    hits = hits_of(patterns, names)
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        for name in hits.get(pattern, ()):
            found.setdefault(name, value)
    return found


def _match_in_process(patterns: Sequence[str], whole: list[str], names: list[str]) -> list[dict[str, str]]:
    what = f"pattern {patterns[0]!r}" if len(patterns) == 1 else f"{len(patterns)} patterns {patterns[0]!r}, ..."
    slow = PeftError(
        f"the {what} took more than {CPU_SECONDS} s on {len(names)} module names: backtracking without bound (nested "
        "or many repeats). Write it more simply, or list the module names."
    )
    if not sys.executable:
        raise slow
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _WORKER % CPU_SECONDS],
            input=json.dumps([whole, names]),
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS if sys.platform != "win32" else CPU_SECONDS + 0.3,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise slow from None
    if done.returncode != 0:
        raise slow
    result: list[dict[str, str]] = json.loads(done.stdout)
    return result


def _backtracks_little(pattern: str) -> bool:
    """True if no repeat holds another or an alternative, there are at most two repeats, and no back-reference.

    Then a name of n characters takes at most about n^2 steps.
    """
    try:
        tree = _parser.parse(pattern)
    except (re.error, RecursionError):
        return False
    repeats = 0
    stack: list[tuple[Any, bool]] = [(tree, False)]
    while stack:
        node, inside = stack.pop()
        for op, arg in node:
            if op in (_sre.MAX_REPEAT, _sre.MIN_REPEAT) or str(op) == "POSSESSIVE_REPEAT":
                low, high, body = arg
                varies = high != low
                if inside and (varies or high > 1):
                    return False
                repeats += varies and high > 1
                stack.append((body, inside or high > 1))
            elif op is _sre.BRANCH:
                if inside:
                    return False
                stack.extend((branch, inside) for branch in arg[1])
            elif op is _sre.SUBPATTERN:
                stack.append((arg[3], inside))
            elif op in (_sre.ASSERT, _sre.ASSERT_NOT):
                stack.append((arg[1], inside))
            elif op in (_sre.LITERAL, _sre.NOT_LITERAL, _sre.ANY, _sre.IN, _sre.AT):
                continue
            else:  # back-references, conditionals, atomic groups: rare, and hard to bound
                return False
    return repeats <= 2
