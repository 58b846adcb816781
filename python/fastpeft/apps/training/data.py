"""From a jsonl file to token ids with a mark on what is to be learned: the completion, or the assistant's turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Example:
    """``input_ids`` and, of the same length, ``learn``: True where the token is to be predicted."""

    input_ids: list[int]
    learn: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Tokens that count in the loss; the first token of a sequence has nothing to be predicted from."""
        return sum(self.learn[1:])


@dataclass
class Dataset:
    """Examples, and what happened to those that were too long."""

    examples: list[Example] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(e) for e in self.examples)

    @property
    def learned(self) -> int:
        return sum(e.learned for e in self.examples)


Record = dict[str, Any]


def read_jsonl(path: str, check: Callable[[object, str], None] | None = None) -> list[tuple[str, Record]]:
    """The records of a jsonl file, each with ``file:line`` for messages; blank lines are skipped.

    check: raises for a record that is none of this file's; `check_record` by default.
    """
    check = check or check_record
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data: expected a jsonl file, {path} is not a file", "give the path of an existing file")
    records: list[tuple[str, Record]] = []
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        record = _parse(raw, where, "utf-8-sig" if number == 1 else "utf-8")
        check(record, where)
        records.append((where, record))
    if not records:
        raise UserError(f"data: {path} holds no records", "write one JSON object with prompt and completion a line")
    return records


def _parse(line: bytes, where: str, encoding: str) -> Any:
    try:
        return json.loads(line.decode(encoding))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start})", "save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno})", "write one JSON object a line"
        ) from error
    except RecursionError:
        raise too_deep(where) from None
    except ValueError as error:  # a number of more digits than Python converts
        raise UserError(f"{where}: {error}", "write it as text, or leave it out") from error


def too_deep(where: str) -> UserError:
    return UserError(f"{where}: lists or objects are nested too deeply", "write one object with text in it")


def check_record(record: object, where: str) -> None:
    """Raise unless ``record`` has ``prompt`` and ``completion``, or ``messages`` with an assistant's turn."""
    if isinstance(record, dict) and "messages" in record:
        check_messages(record["messages"], f"{where}: messages")
        if not any(m["role"] == "assistant" for m in record["messages"]):
            raise UserError(f"{where}: no message has the role assistant", "add the answer that is to be learned")
        return
    check_fields(record, ("prompt",), ("completion",), where, "a record needs prompt and completion, or messages")


def check_fields(record: object, prompts: Sequence[str], answers: Sequence[str], where: str, needs: str) -> None:
    """Raise unless ``record`` has text in all of these fields, and some in the answers. needs: what it should have."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {_type(record)}", "write {...}")
    missing = [key for key in (*prompts, *answers) if key not in record]
    if missing:
        found = _short(", ".join(record)) or "nothing"
        raise UserError(f"{where}: missing {' and '.join(missing)} (found: {found})", needs)
    for key in (*prompts, *answers):
        if not isinstance(record[key], str):
            raise UserError(f"{where}: expected text in {key!r}, got {_type(record[key])}", "write a string")
        check_text(record[key], f"{where}: {key}")
    for key in answers:
        if not record[key].strip():
            raise UserError(f"{where}: the {key} is empty", "write what is to be learned, or remove the line")


def check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of messages, got {_type(messages)}", "write [{role, content}, ...]")
    for index, message in enumerate(messages):
        at = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise UserError(
                f"{at}: expected an object with role and content, got {_type(message)}", "write {role, content}"
            )
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise UserError(f"{at}: unknown role {_short(repr(role))}", f"use one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{at}: expected text in 'content', got {_type(content)}", "write a string")
        check_text(content, f"{at}.content")


def check_text(text: str, where: str) -> None:
    """Raise for half of a surrogate pair, which JSON's escapes can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{where}: {code} at character {error.start} is half of a surrogate pair", "write the whole character"
        ) from error


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


class Encoder:
    """Turns records into examples with one tokenizer and one template rule.

    Every segment (prompt, answer, what stands between turns) is tokenized on its own, so a trained prompt has exactly
    the tokens that the same prompt has at inference, whatever the tokenizer would merge across the boundary.
    """

    def __init__(
        self, tokenizer: Any, template: str = "auto", max_length: int = 512, truncate: str = "completion"
    ) -> None:
        self.tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise UserError("template=chat, but the tokenizer has no chat template", "use template=plain")
        self.chat = template == "chat" or (template == "auto" and has_template)
        self.max_length = max_length
        self.truncate = truncate
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json")

    def dataset(self, records: Iterable[tuple[str, Record]]) -> Dataset:
        """Encode all records; ``where`` of each names the line in errors."""
        result = Dataset()
        for where, record in records:
            example = self.encode(record, where)
            shorter = self._shorten(example, where)
            if shorter is None:
                result.dropped += 1
                continue
            result.cut += len(shorter) < len(example)
            result.examples.append(shorter)
        if not result.examples:
            raise UserError(
                f"no example is left: all {result.dropped} are longer than max_length={self.max_length}",
                "raise max_length",
            )
        return result

    def encode(self, record: Record, where: str = "record") -> Example:
        check_record(record, where)
        messages = record.get("messages")
        if messages is None:
            if not self.chat:
                return self._join([(record["prompt"], False), (record["completion"], True)], start=True, end=True)
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        elif not self.chat:
            raise UserError(
                f"{where}: messages need a chat template, which this tokenizer lacks", "use prompt and completion"
            )
        return self._join(self._segments(messages, where), start=False, end=False)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens in front of the answer to ``prompt``, the same at training and at inference."""
        check_text(prompt, "prompt")
        if not self.chat:
            return self._start() + self._tokens(prompt)
        return self._tokens(self._render([{"role": "user", "content": prompt}], generate=True))

    def _segments(self, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
        """The rendered conversation cut at the bounds of the assistant's turns."""
        segments: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], generate=True, where=where)
            after = self._render(messages[: index + 1], generate=False, where=where)
            if not before.startswith(done) or not after.startswith(before):
                raise UserError(
                    f"{where}: the chat template rewrites earlier turns, so what is to be learned cannot be cut out",
                    "use prompt and completion, or one assistant turn a record",
                )
            segments += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return segments

    def _render(self, messages: list[dict[str, str]], generate: bool, where: str = "prompt") -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # a template is a program of the model's, which may raise anything
            raise UserError(
                f"{where}: the chat template refuses it ({type(error).__name__}: {_short(str(error))})",
                "write the turns that the model's template takes",
            ) from error
        check_text(text, where)
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _start(self) -> list[int]:
        """The tokens that this tokenizer puts in front of plain text, usually none or the begin token."""
        bos = self.tokenizer.bos_token_id
        first: list[int] = self.tokenizer("a")["input_ids"][:1]
        return [bos] if bos is not None and first == [bos] else []

    def _join(self, segments: list[tuple[str, bool]], start: bool, end: bool) -> Example:
        ids = self._start() if start else []
        learn = [False] * len(ids)
        eos = self.tokenizer.eos_token_id
        for text, learned in segments:
            tokens = self._tokens(text)
            marks = [learned] * len(tokens)
            if learned and eos in tokens:  # a template's newline after the end token is never generated
                last = len(tokens) - 1 - tokens[::-1].index(eos)
                marks[last + 1 :] = [False] * (len(tokens) - last - 1)
            ids += tokens
            learn += marks
        if end:
            ids.append(eos)
            learn.append(True)
        while learn and not learn[-1]:  # nothing learns from what follows the last learned token
            ids.pop()
            learn.pop()
        return Example(ids, learn)

    def _shorten(self, example: Example, where: str) -> Example | None:
        excess = len(example) - self.max_length
        if excess <= 0:
            return example
        if self.truncate == "error":
            raise UserError(
                f"{where}: {len(example)} tokens are more than max_length={self.max_length}",
                "raise max_length or set truncate",
            )
        if self.truncate == "drop":
            return None
        if self.truncate == "completion":
            shorter = Example(example.input_ids[: self.max_length], example.learn[: self.max_length])
        else:
            shorter = Example(example.input_ids[excess:], example.learn[excess:])
        return shorter if shorter.learned else None
