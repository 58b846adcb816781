"""Regular expressions from configurations, bounded in length and in time.

A configuration may come from a stranger, and `re` can take exponential time. The package `regex` matches with a limit
of time; `re` decides what is an expression, and what the two read differently is refused.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import regex

from ..files.checks import list_some
from .limits import MAX_PATTERN, MAX_PATTERNS, is_plain
from .types import PeftError

CPU_SECONDS = 0.5  # for what a call matches
_EACH = 1e-5  # and for each name and pattern: honest patterns take a tenth of it

# Which `regex` reads as approximate matches and as classes, and `re` as the characters that they are.
_READ_OTHERWISE = re.compile(r"(?<!\\)(?<!\\N)\{(?!\d*,?\d*\})|\[:\^?\w+:\]")
# `regex` writes `(ab){100}` out: repeat counts, which multiply where they are nested, times what is repeated.
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_MAX_WRITTEN_OUT = 100_000


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
    end = time.thread_time() + CPU_SECONDS + _EACH * len(names) * len(patterns)
    found: list[dict[str, str]] = []
    try:
        for pattern in patterns:
            match = _compiled(pattern, prefix, suffix).match
            # `regex` counts the processor time of all threads: enough to end a match that has no end.
            matches = ((name, match(name, timeout=max(end - time.thread_time(), 0.0))) for name in names)
            found.append({name: m.groupdict().get("idx") or "" for name, m in matches if m})
    except TimeoutError:
        what = f"pattern {patterns[0]!r}" if len(patterns) == 1 else f"{len(patterns)} patterns {patterns[0]!r}, ..."
        raise PeftError(
            f"the {what} took more than {CPU_SECONDS} s on {len(names)} module names: backtracking without bound "
            "(nested or many repeats). Write it more simply, or list the module names."
        ) from None
    return found


def _compiled(pattern: str, prefix: str, suffix: str) -> Any:
    """The expression `prefix + pattern + suffix`, or an error that says what is wrong with the pattern."""
    if len(pattern) > MAX_PATTERN:
        raise PeftError(f"a pattern of {len(pattern)} characters: at most {MAX_PATTERN} are accepted")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PeftError(f"{pattern!r} is not a valid regular expression: {error}") from None
    if _READ_OTHERWISE.search(pattern):
        raise PeftError(f"{pattern!r} has braces that are no repeat count, or a class as [:alpha:]: spell it out")
    counts = math.prod(max(1, *(int(n or 1) for n in found.groups())) for found in _COUNT.finditer(pattern))
    if counts * len(pattern) > _MAX_WRITTEN_OUT:
        raise PeftError(f"{pattern!r} repeats {counts} times: write it with + or *, or list the module names")
    flags = re.match(r"\(\?[aiLmsux]+\)", pattern)  # these must stand at the start
    start = flags.end() if flags else 0
    whole = f"{pattern[:start]}{prefix}(?:{pattern[start:]}){suffix}"
    try:
        re.compile(whole)
        return regex.compile(whole, regex.VERSION0)
    except (re.error, regex.error, RecursionError):
        raise PeftError(f"{pattern!r} cannot be used as part of a regular expression") from None


def hits_of(patterns: Iterable[str], names: Sequence[str]) -> dict[str, Iterable[str]]:
    """The names that each pattern matches, wholly or from a dot on."""
    patterns = list(patterns)
    hits: dict[str, Iterable[str]] = {p: [] for p in patterns if is_plain(p)}
    for name in names:
        end = name
        while end:  # each end of it that starts after a dot
            if end in hits:
                hits[end].append(name)  # type: ignore[attr-defined]
            end = end.partition(".")[2]
    # No module has this name: it is read as a regular expression, its dots for any character.
    others = [p for p in patterns if not hits.get(p) and not p.isidentifier()]
    if len(others) > MAX_PATTERNS:
        what = f"{len(others)} patterns, {list_some(others, 3)}, are no module's name"
        raise PeftError(f"{what}: at most {MAX_PATTERNS} are tried as expressions")
    hits.update(zip(others, match_all(others, names, prefix=r"(?:.*\.)?"), strict=True))
    return hits


def first_match(patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """For each name the value of the first pattern that matches it or a part of it that starts after a dot."""
    hits = hits_of(patterns, names)
    last_first = reversed([*patterns.items()])
    return {name: value for pattern, value in last_first for name in hits.get(pattern, ())}
