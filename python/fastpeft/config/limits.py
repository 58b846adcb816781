"""Limits of an adapter's name and of the values in its configuration."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..files.checks import MAX_JSON_BYTES, AdapterFileError, name_of, short

MAX_RANK = 1 << 16
MAX_SCALE = 1e6  # of alpha: a scaling beyond this overflows float16 and leaves bfloat16 no digit of the base output
MAX_NUMBER = 2.0**64  # the largest seeds
MAX_STRING = 1 << 16
MAX_PATTERN = 1000
MAX_NAMES = 1 << 16  # LoRA on every expert of a large mixture names 46 thousand modules
MAX_PATTERNS = 4096  # of them expressions, which are tried one by one
MAX_DEPTH = 16

# Fields of names or expressions of modules.
NAMES = (
    "target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save",
    "target_parameters",
)  # fmt: skip
BASE = "__base__"  # no adapter, where rows of a batch name theirs
_ADAPTER_NAME = re.compile(r"(?! )[A-Za-z0-9_ -]{1,64}(?<! )")
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]*")


def is_plain(pattern: str) -> bool:
    """True for a module name, False for an expression (a dot of a name stands for a dot)."""
    return _PLAIN.fullmatch(pattern) is not None


def check_adapter_name(name: object) -> str:
    """Return `name` if it can be a folder, a key and a module name: 1 to 64 of letters, digits, `_`, `-` and, inside,
    spaces."""
    if not isinstance(name, str) or _ADAPTER_NAME.fullmatch(name) is None:
        expected = "1 to 64 of the characters A-Z a-z 0-9 _ - and spaces inside"
        raise AdapterFileError(f"adapter name {short(name)}: expected {expected}")
    if name == BASE:
        raise AdapterFileError(f"adapter name {name!r}: in a batch it stands for the model without an adapter")
    return name


class _Checks:
    """Checks of one configuration's values. where: what it is or which file it is from."""

    def __init__(self, where: object) -> None:
        self.where, self.name = where, name_of(where)

    def fail(self, field: str, expected: str, found: object) -> AdapterFileError:
        told = f"expected {expected}"
        return AdapterFileError(
            f"{self.where}: {field} = {short(found)}: {told}", f"{self.name}: {field.partition('[')[0]}: {told}"
        )

    def rank(self, value: object, field: str, least: int = 1) -> None:
        if type(value) is not int or not least <= value <= MAX_RANK:
            integer = "a positive integer" if least else "an integer, 0 or positive,"
            raise self.fail(field, f"{integer} of at most {MAX_RANK}", value)

    def kept(self, value: object, field: str) -> None:
        """AdaLoRA's pattern has a bool for each rank: True if it was kept."""
        if not isinstance(value, list) or len(value) > MAX_RANK or not all(isinstance(v, bool) for v in value):
            raise self.fail(field, f"at most {MAX_RANK} times true or false", value)

    def scale(self, value: object, field: str) -> None:
        if not is_number(value) or not abs(value) <= MAX_SCALE:  # type: ignore[arg-type]
            raise self.fail(field, f"a number of magnitude at most {MAX_SCALE:g}", value)

    def names(self, patterns: Collection[Any], field: str) -> None:
        if len(patterns) > MAX_NAMES:
            raise self.fail(field, f"at most {MAX_NAMES} entries", f"{len(patterns)} entries")
        for pattern in patterns:
            if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
                raise self.fail(field, f"names or patterns of at most {MAX_PATTERN} characters", pattern)

    def patterns(self, values: object, field: str, check: Any) -> None:
        """Values by the names or expressions of modules."""
        if not isinstance(values, Mapping):
            raise self.fail(field, "an object", values)
        self.names(values, field)
        if (count := sum(not is_plain(pattern) for pattern in values)) > MAX_PATTERNS:
            raise self.fail(field, f"at most {MAX_PATTERNS} expressions beside names", f"{count} expressions")
        for pattern, value in values.items():
            check(value, f"{field}[{short(pattern)}]")

    def anything(self, value: object, field: str, depth: int = 1) -> None:
        """A value that json holds as it is, within the limits of all values."""
        if depth > MAX_DEPTH:
            raise self.fail(field, f"values nested at most {MAX_DEPTH} deep", "values nested deeper")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise self.fail(field, "texts as keys", key)
                self.anything(key, field, depth + 1)
                self.anything(item, field, depth + 1)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self.anything(item, field, depth + 1)
            sorts = all(isinstance(v, str) for v in value) or all(is_number(v) for v in value)
            if isinstance(value, (set, frozenset)) and not sorts:  # a file has it as a sorted list
                raise self.fail(field, "texts alone or numbers alone in a set", value)
        elif isinstance(value, str):
            if len(value) > MAX_STRING:
                raise self.fail(field, f"a text of at most {MAX_STRING} characters", f"{len(value)} characters")
        elif is_number(value):
            if not abs(value) <= MAX_NUMBER:  # type: ignore[arg-type]
                raise self.fail(field, f"a number of magnitude at most {MAX_NUMBER:g}", value)
        elif value is not None and not isinstance(value, (bool, enum.Enum)):
            raise self.fail(field, "what json can hold", value)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_config(config: Mapping[str, Any], where: object = "adapter configuration") -> None:
    """Check the values of an adapter configuration for size and sense, whatever its method: of one that is read from a
    file, made, put into a model or saved. Raises AdapterFileError with the field, its value and what was expected.

    Fields that are unknown are checked for what holds for all: whoever builds the configuration drops them.
    """
    checks = _Checks(where)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or not peft_type:
        raise checks.fail("peft_type", "a method's name", peft_type)
    method = (peft_type.value if isinstance(peft_type, enum.Enum) else peft_type).upper()
    set_fields = {field: value for field, value in config.items() if value is not None}
    if "r" in set_fields:
        checks.rank(set_fields["r"], "r", least=1 if method == "LORA" else 0)
    for field in ("lora_alpha", "alpha"):
        if field in set_fields:
            checks.scale(set_fields[field], field)
    ranks = {"ADALORA": checks.kept, "OSF": checks.scale}.get(method, checks.rank)  # OSF: fractions
    for field, check in (("rank_pattern", ranks), ("alpha_pattern", checks.scale)):
        if field in set_fields:
            checks.patterns(set_fields[field], field, check)
    for field in NAMES:
        value = set_fields.get(field, ())
        if not isinstance(value, (str, list, tuple, set, frozenset)):
            rule = f"{field} must be a text or a list of them"
            raise AdapterFileError(f"{where}: {rule}, found {short(value)}", f"{checks.name}: {rule}")
        checks.names([value] if isinstance(value, str) else value, field)
    for field, value in set_fields.items():
        checks.anything(value, str(field))


def check_numbers(config: Mapping[str, Any], types: Mapping[str, str], where: object) -> None:
    """Raise AdapterFileError for a field that takes a number and holds something else. types: as they are written."""
    for field, type_ in types.items():
        fits = isinstance(config[field], (int, float)) or (config[field] is None and "None" in type_)
        if not fits and set(type_.split(" | ")) <= {"int", "float", "None"}:
            raise _Checks(where).fail(field, "a number", config[field])


def check_bytes(content: Mapping[str, Any], where: object) -> None:
    """Raise AdapterFileError for a configuration whose file would be too large to be read."""
    text = json.dumps(content, default=str)
    size = len(text) + 16 * text.count(",")  # in a file each value is on a line of its own
    if size > MAX_JSON_BYTES:
        raise AdapterFileError(f"{where}: a file of about {size} bytes, expected at most {MAX_JSON_BYTES}")
