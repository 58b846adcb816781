"""From tokens to text while they arrive, and where to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Decoder:
    """Text of tokens that arrive one by one; half of a character waits for its other half."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0  # of the tokens that are decoded together, and of those whose text is out

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        return self.flush(False)

    def flush(self, last: bool = True) -> str:
        """The text that is left, half characters as they are."""
        # A token's text depends on its left neighbours (spaces): decode with those, and take what they add.
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if not last and now.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


class Stops:
    """Holds text back while it may be the beginning of a stop string, and ends it before one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def push(self, text: str, last: bool = False) -> str:
        """The part of the text so far that may go out."""
        if self.hit:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.hit = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` a stop string begins with, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
