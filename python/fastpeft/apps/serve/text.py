"""From tokens to text while they arrive, and where to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import bad, failed


def encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """The tokens of a prompt. special: with those that the tokenizer puts around texts. Raises ApiError."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # whatever a text makes go wrong is its own request's
        raise bad(f"the model's tokenizer cannot take the prompt: {error!r:.200}", "prompt") from error
    return ids


_HALF = 16  # tokens: whole characters have at most four, so that after these it is none, and waits no longer


class Decoder:
    """Text of tokens that arrive one by one; half of a character waits for its other half. Raises ApiError."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0  # of the tokens that are decoded together, and of those whose text is out

    def _decode(self, ids: list[int]) -> str:
        return self._spelled(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _spelled(self, ids: list[int], **how: bool) -> str:
        try:
            text: str = self._tokenizer.decode(ids, **how)
        except Exception as error:
            raise failed("the model's tokenizer cannot spell the answer", error, "tokenizer_error") from error
        return text

    def spell(self, token: int) -> str:
        """One token by itself, whatever is beside it."""
        return self._spelled([token])

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        return self.flush(False)

    def flush(self, last: bool = True) -> str:
        """The text that is left, half characters as they are."""
        # A token's text depends on its left neighbours (spaces): decode with those, and take what they add.
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if not last and now.endswith("\ufffd") and len(self._ids) - self._read < _HALF:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


class Stop:
    """One stop string, and how much of it the text ends with: `matched` characters.

    Each character of the text costs a bounded number of steps, and the table grows with `matched` alone, so that
    neither long strings nor texts that nearly match cost more than their length (Knuth, Morris and Pratt).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0, 0]  # of the first n characters: the longest beginning, short of all n, that is also an end

    def push(self, text: str) -> int | None:
        """The place in `text` behind the first end of the stop string; None without one."""
        stop, borders, n = self.text, self._borders, self.matched
        at = 0
        while at < len(text):
            if n == 0:
                at = text.find(stop[0], at)
                if at < 0:
                    break
            while n and stop[n] != text[at]:
                n = borders[n]
            n += stop[n] == text[at]
            at += 1
            if n == len(stop):
                return at
            if n == len(borders):
                border = borders[-1]
                while border and stop[border] != stop[n - 1]:
                    border = borders[border]
                borders.append(border + (stop[border] == stop[n - 1]))
        self.matched = n
        return None


class Stops:
    """Holds text back while it may be the beginning of a stop string, and ends it before one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [Stop(stop) for stop in dict.fromkeys(stops) if stop]
        self._held = ""
        self.hit = False

    def push(self, text: str, last: bool = False) -> str:
        """The part of the text so far that may go out."""
        if self.hit:
            return ""
        before = len(self._held)
        self._held += text
        found = [before + end - len(stop.text) for stop in self._stops if (end := stop.push(text)) is not None]
        if found:
            self.hit = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = 0 if last else max((stop.matched for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out
