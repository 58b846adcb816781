"""What a file must be before its content is believed.

Everything here runs before a tensor is allocated or a model is touched: names, paths, json and the header of a
safetensors file are read with bounds, and whatever breaks one raises `AdapterFileError` with the file, what was found
and what was expected. Nothing here imports a name that stands in a file, and nothing unpickles.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAX_JSON_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 16  # LoRA on every expert of a large mixture has 46 thousand, and a header of about 9 MB
MAX_RANK = 1 << 16
MAX_SCALE = 1e6  # of alpha: a scaling beyond this overflows float16 and leaves bfloat16 no digit of the base output
MAX_NUMBER = 1e15
MAX_STRING = 1 << 16
MAX_PATTERN = 1000
MAX_PATTERNS = 4096
MAX_DEPTH = 16
MAX_DIMS = 8

BASE = "__base__"  # no adapter, where rows of a batch name theirs
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

# The names that the safetensors format gives to dtypes.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class AdapterFileError(ValueError):
    """A file, name or configuration that must not be used; the message says which rule it breaks."""


def check_adapter_name(name: object) -> str:
    """Return `name` if it can be a folder, a key and a module name: 1 to 64 of letters, digits, `_` and `-`."""
    if not isinstance(name, str) or _ADAPTER_NAME.fullmatch(name) is None:
        raise AdapterFileError(f"adapter name {_short(name)}: expected 1 to 64 of the characters A-Z a-z 0-9 _ -")
    if name == BASE:
        raise AdapterFileError(f"adapter name {name!r}: in a batch it stands for the model without an adapter")
    return name


def path_inside(root: str | os.PathLike[str], *parts: str) -> Path:
    """`root/parts...`, symbolic links followed, which must not leave `root`."""
    base = Path(root).resolve()
    path = base.joinpath(*parts).resolve()
    if path != base and base not in path.parents:
        raise AdapterFileError(f"path {_short('/'.join(parts))} leaves its folder {base}")
    return path


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _no_constant(text: str) -> float:
    raise AdapterFileError(f"json holds {text}, which is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise AdapterFileError(f"json names {_short(key)} twice")
        found[key] = value
    return found


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """A json object without NaN or Infinity and without repeated keys; anything else is an error that names `where`."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise AdapterFileError(f"{where}: not valid json ({_short(str(error))})") from None
    if not isinstance(value, dict):
        raise AdapterFileError(f"{where}: expected a json object, found {type(value).__name__}")
    return value


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a json object of at most `max_bytes`."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise AdapterFileError(f"{path}: larger than {max_bytes} bytes, too large for a configuration")
    return parse_json(data, path)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. A pipe or device in its place would block or never end."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise AdapterFileError(f"{path}: not a regular file")
    return open(path, "rb")


def check_config(config: Mapping[str, Any], where: object = "adapter configuration") -> None:
    """Check the values of an adapter configuration for size and sense, whatever its method.

    Fields that are unknown are left alone: whoever builds the configuration drops them with a warning.
    """
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or not peft_type:
        raise AdapterFileError(f"{where}: peft_type must be a method's name, found {_short(peft_type)}")
    _check_rank(config.get("r"), f"{where}: r", least=1 if peft_type.upper() == "LORA" else 0)
    for field in ("lora_alpha", "alpha"):
        _check_scale(config.get(field), f"{where}: {field}")
    check_ranks = {"ADALORA": _check_kept, "OSF": _check_scale}.get(peft_type.upper(), _check_rank)  # OSF: fractions
    for field, check in (("rank_pattern", check_ranks), ("alpha_pattern", _check_scale)):
        patterns = config.get(field)
        if patterns is None:
            continue
        if not isinstance(patterns, Mapping):
            raise AdapterFileError(f"{where}: {field} must be an object, found {_short(patterns)}")
        _check_count(patterns, f"{where}: {field}")
        for pattern, value in patterns.items():
            _check_pattern(pattern, f"{where}: {field}")
            check(value, f"{where}: {field}[{_short(pattern)}]")
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(field)
        if not isinstance(value, (str, list, tuple, set, frozenset, type(None))):
            raise AdapterFileError(f"{where}: {field} must be a text or a list of them, found {_short(value)}")
        if isinstance(value, str):
            value = [value]
        _check_count(value or (), f"{where}: {field}")
        for pattern in value or ():
            _check_pattern(pattern, f"{where}: {field}")
    _walk(config, where, 0)


def _check_count(patterns: Collection[Any], where: str) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise AdapterFileError(f"{where}: {len(patterns)} entries, at most {MAX_PATTERNS} are read")


def _check_pattern(pattern: object, where: str) -> None:
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        raise AdapterFileError(f"{where}: expected names or patterns of at most {MAX_PATTERN} characters, "
                               f"found {_short(pattern)}")  # fmt: skip


def _check_rank(value: object, where: str, least: int = 1) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_RANK:
        raise AdapterFileError(f"{where} = {_short(value)}: expected an integer from {least} to {MAX_RANK}")


def _check_kept(value: object, where: str) -> None:
    """AdaLoRA's pattern says of each rank whether it was kept."""
    if not isinstance(value, list) or len(value) > MAX_RANK or not all(isinstance(v, bool) for v in value):
        raise AdapterFileError(f"{where} = {_short(value)}: expected at most {MAX_RANK} times true or false")


def _check_scale(value: object, where: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_SCALE:
        raise AdapterFileError(f"{where} = {_short(value)}: expected a number of magnitude at most {MAX_SCALE:g}")


def _walk(value: object, where: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise AdapterFileError(f"{where}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _walk(key, where, depth + 1)
            _walk(item, where, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _walk(item, where, depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_STRING:
            raise AdapterFileError(f"{where}: a text of {len(value)} characters")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= MAX_NUMBER:
        raise AdapterFileError(f"{where}: the number {_short(value)}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its place in the file, in bytes, and what it holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked safetensors header: every tensor lies in the file, none overlaps another, nothing is left over."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def read_header(
    path: str | os.PathLike[str], max_header: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS
) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read."""
    path = Path(path)
    with open_regular(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise AdapterFileError(f"{path}: {file_size} bytes, shorter than a safetensors header (truncated?)")
        length = int.from_bytes(prefix, "little")
        if length > max_header:
            raise AdapterFileError(f"{path}: its header claims {length} bytes, the limit is {max_header}")
        if 8 + length > file_size:
            raise AdapterFileError(f"{path}: its header claims {length} bytes in a file of {file_size} (truncated?)")
        text = file.read(length)
    # Each tensor is an object with two lists. Counted first, since parsing millions of anything takes seconds.
    if text.count(b"{") > max_tensors + 2 or text.count(b"[") > 2 * max_tensors:
        raise AdapterFileError(f"{path}: its header describes more than {max_tensors} tensors")
    raw = parse_json(text, path)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(f"{path}: __metadata__ must map texts to texts")
    data_start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in raw.items()}
    end = data_start
    # Zero-sized tensors may share an offset with their neighbour, hence the second key.
    for info in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
        if info.begin != end:
            what = "overlaps the tensor before it" if info.begin < end else "leaves a gap before it"
            raise AdapterFileError(f"{path}: tensor {_short(info.name)} {what}")
        end += info.nbytes
    if end != file_size:
        raise AdapterFileError(f"{path}: the header describes {end} bytes, the file has {file_size} (truncated?)")
    return Header(path, tensors, metadata)


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    def error(what: str) -> AdapterFileError:
        return AdapterFileError(f"{path}: tensor {_short(name)}: {what}")

    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise error(f"expected dtype, shape and data_offsets, found {_short(entry)}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise error(f"unknown dtype {_short(kind)}")
    if not _is_ints(shape) or len(shape) > MAX_DIMS:
        raise error(f"shape {_short(shape)}")
    if not _is_ints(offsets) or len(offsets) != 2:
        raise error(f"data_offsets {_short(offsets)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise error(f"{_short(shape)} of {dtype} needs {nbytes} bytes, which the data_offsets {offsets} are not")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


_ENTRY = {"dtype", "shape", "data_offsets"}


def _is_ints(value: object) -> bool:
    if type(value) is not list:
        return False
    for number in value:  # noqa: SIM110 (a generator takes three times as long, and there are many)
        if type(number) is not int or not 0 <= number < 1 << 63:
            return False
    return True


def read_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors of a checked file into memory of their own: a mapped file that shrinks later would crash us."""
    tensors: dict[str, torch.Tensor] = {}
    with open_regular(header.path) as file:
        for name in header.tensors if names is None else names:
            info = header.tensors[name]
            data = torch.empty(info.nbytes, dtype=torch.uint8)
            file.seek(info.begin)
            if info.nbytes and _fill(file, data) != info.nbytes:
                raise AdapterFileError(f"{header.path}: ended inside tensor {_short(name)} (truncated?)")
            tensors[name] = data.view(info.dtype).view(info.shape)
    return tensors


def _fill(file: Any, data: torch.Tensor) -> int:
    return int(file.readinto(data.numpy()))


def check_finite(tensors: Mapping[str, torch.Tensor], where: object) -> None:
    """Raise if a floating-point tensor holds NaN or infinity, and name the tensors that do."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _all_finite(tensor)]
    if bad:
        raise AdapterFileError(f"{where}: NaN or infinite values in {list_some(bad)}")


def _all_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    # One sum per tensor instead of a mask the size of the tensor; only a sum that overflows needs the mask.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64))) or bool(torch.isfinite(tensor).all())


def list_some(names: Iterable[str], limit: int = 8) -> str:
    """The first names and how many more there are, for error messages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
