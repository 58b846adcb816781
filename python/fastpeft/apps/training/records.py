"""A line of data: what it has to hold, and an error that names it where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .errors import UserError

_ROLES = ("system", "user", "assistant", "tool", "developer")

Record = dict[str, Any]


Check = Callable[[object, str], None]


def parse(line: bytes, where: str, encoding: str, check: Check | None = None) -> Record:
    """The record of a line; raises UserError, which begins with ``where``, for one that cannot be learned from.

    check: raises for a record that is none; `check_record` by default.
    """
    record = _json(line, where, encoding)
    (check or check_record)(record, where)
    return record  # type: ignore[no-any-return]


def _json(line: bytes, where: str, encoding: str) -> Any:
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
        found = shortened(", ".join(record)) or "nothing"
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
            raise UserError(f"{at}: unknown role {shortened(repr(role))}", f"use one of {', '.join(_ROLES)}")
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


def shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
