"""Answers in OpenAI's shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Piece:
    """Some text and the tokens behind it (a token that completes no text yet comes with a later piece's)."""

    text: str
    tokens: list[tuple[str, float]] = field(default_factory=list)  # text and logprob of each
    end: str | None = None


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True)
class Shape:
    """Of one request: a chat's or a completion's. logprobs: whether they were asked for."""

    id: str
    created: int
    model: str
    chat: bool
    logprobs: bool
    stream_usage: bool = False

    def whole(self, pieces: Sequence[Piece], prompt: int, completion: int) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs(tokens, 0), "finish_reason": pieces[-1].end}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self._head(False), "choices": [choice], "usage": usage(prompt, completion)}

    def first(self) -> str | None:
        """The event before any text, if there is one."""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None) if self.chat else None

    def part(self, piece: Piece, offset: int) -> str:
        """offset: characters that were sent before."""
        content: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}}
        logprobs = self._logprobs(piece.tokens, offset) if piece.tokens else None
        return self._event(content if self.chat else {"text": piece.text}, piece.end, logprobs)

    def totals(self, prompt: int, completion: int) -> str:
        return event({**self._head(True), "choices": [], "usage": usage(prompt, completion)})

    def _event(self, content: dict[str, Any], end: str | None, logprobs: Any = None) -> str:
        body = {**self._head(True), "choices": [{"index": 0, **content, "logprobs": logprobs, "finish_reason": end}]}
        if self.stream_usage:
            body["usage"] = None
        return event(body)

    def _head(self, chunk: bool) -> dict[str, Any]:
        name = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[tuple[str, float]], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            content = [
                {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                for text, value in tokens
            ]
            return {"content": content}
        offsets = []
        for text, _ in tokens:
            offsets.append(offset)
            offset += len(text)
        return {"tokens": [text for text, _ in tokens], "token_logprobs": [value for _, value in tokens],
                "top_logprobs": None, "text_offset": offsets}  # fmt: skip


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"


def model_entry(name: str, parent: str | None, created: int) -> dict[str, Any]:
    """An entry of /v1/models; `parent` is the base of an adapter. `root`, the base's path in vLLM, is its name here."""
    return {
        "id": name, "object": "model", "created": created, "owned_by": "fastpeft", "root": parent or name,
        "parent": parent,
    }  # fmt: skip
