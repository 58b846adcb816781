"""Limits of an adapter's name and of the values in its configuration."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..files.checks import AdapterFileError, short

MAX_RANK = 1 << 16
MAX_SCALE = 1e6  # of alpha: a scaling beyond this overflows float16 and leaves bfloat16 no digit of the base output
MAX_NUMBER = 1e15
MAX_STRING = 1 << 16
MAX_PATTERN = 1000
MAX_PATTERNS = 4096
MAX_DEPTH = 16

BASE = "__base__"  # no adapter, where rows of a batch name theirs
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_adapter_name(name: object) -> str:
    """Return `name` if it can be a folder, a key and a module name: 1 to 64 of letters, digits, `_` and `-`."""
    if not isinstance(name, str) or _ADAPTER_NAME.fullmatch(name) is None:
        raise AdapterFileError(f"adapter name {short(name)}: expected 1 to 64 of the characters A-Z a-z 0-9 _ -")
    if name == BASE:
        raise AdapterFileError(f"adapter name {name!r}: in a batch it stands for the model without an adapter")
    return name


def check_config(config: Mapping[str, Any], where: object = "adapter configuration") -> None:
    """Check the values of an adapter configuration for size and sense, whatever its method.

    Fields that are unknown are left alone: whoever builds the configuration drops them with a warning.
    """
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or not peft_type:
        raise AdapterFileError(f"{where}: peft_type must be a method's name, found {short(peft_type)}")
    _check_rank(config.get("r"), f"{where}: r", least=1 if peft_type.upper() == "LORA" else 0)
    for field in ("lora_alpha", "alpha"):
        _check_scale(config.get(field), f"{where}: {field}")
    check_ranks = {"ADALORA": _check_kept, "OSF": _check_scale}.get(peft_type.upper(), _check_rank)  # OSF: fractions
    for field, check in (("rank_pattern", check_ranks), ("alpha_pattern", _check_scale)):
        patterns = {} if config.get(field) is None else config[field]
        if not isinstance(patterns, Mapping):
            raise AdapterFileError(f"{where}: {field} must be an object, found {short(patterns)}")
        _check_patterns(patterns, f"{where}: {field}")
        for pattern, value in patterns.items():
            check(value, f"{where}: {field}[{short(pattern)}]")
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(field)
        if not isinstance(value, (str, list, tuple, set, frozenset, type(None))):
            raise AdapterFileError(f"{where}: {field} must be a text or a list of them, found {short(value)}")
        _check_patterns([value] if isinstance(value, str) else value or (), f"{where}: {field}")
    _walk(config, where, 0)


def _check_patterns(patterns: Collection[Any], where: str) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise AdapterFileError(f"{where}: {len(patterns)} entries, at most {MAX_PATTERNS} are read")
    for pattern in patterns:
        if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
            expected = f"names or patterns of at most {MAX_PATTERN} characters"
            raise AdapterFileError(f"{where}: expected {expected}, found {short(pattern)}")


def _check_rank(value: object, where: str, least: int = 1) -> None:
    if value is not None and (type(value) is not int or not least <= value <= MAX_RANK):
        raise AdapterFileError(f"{where} = {short(value)}: expected an integer from {least} to {MAX_RANK}")


def _check_kept(value: object, where: str) -> None:
    """AdaLoRA's pattern has a bool for each rank: True if it was kept."""
    if not isinstance(value, list) or len(value) > MAX_RANK or not all(isinstance(v, bool) for v in value):
        raise AdapterFileError(f"{where} = {short(value)}: expected at most {MAX_RANK} times true or false")


def _check_scale(value: object, where: str) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_SCALE
    if value is not None and not fits:
        raise AdapterFileError(f"{where} = {short(value)}: expected a number of magnitude at most {MAX_SCALE:g}")


def _walk(value: object, where: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise AdapterFileError(f"{where}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        for item in (*value, *value.values()) if isinstance(value, Mapping) else value:
            _walk(item, where, depth + 1)
    elif isinstance(value, str) and len(value) > MAX_STRING:
        raise AdapterFileError(f"{where}: a text of {len(value)} characters")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= MAX_NUMBER:
        raise AdapterFileError(f"{where}: the number {short(value)}")
