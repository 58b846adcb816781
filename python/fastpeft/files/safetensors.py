"""Tensors of safetensors files: the header is checked before a tensor is allocated, the values before they are used."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

from .checks import AdapterFileError, list_some, name_of, open_regular, parse_json, short
from .mapped import map_bytes

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 16  # LoRA on every expert of a large mixture has 46 thousand, and a header of about 9 MB
MAX_DIMS = 8
MAX_ELEMENTS = 1 << 48  # counted as if no dimension were 0
_PIECE = 1 << 20
_ALIGNED = 64  # bytes of a line of the processor's cache

# The names that the safetensors format gives to dtypes.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """A checked safetensors header: every tensor lies in the file, none overlaps another, nothing is left over.

    tensors: on the meta device, for their shapes and dtypes. begins: where in the file they start. stamp: size and time
    of the file that was read.
    """

    path: str | os.PathLike[str]
    tensors: dict[str, torch.Tensor]
    begins: dict[str, int]
    metadata: dict[str, str]
    stamp: tuple[int, int]


def read_header(
    path: str | os.PathLike[str], max_header: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS
) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read."""
    from safetensors import SafetensorError, safe_open

    def broken(rule: str, found: str = "") -> AdapterFileError:
        return AdapterFileError(f"{path}: {found}{rule}", f"{name_of(path)}: {rule}")

    with open_regular(path) as file:
        stamp = _stamp(file)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > max_header:
            raise broken(f"no safetensors file, or its header claims more than {max_header} bytes")
        text = file.read(length)
    # Each tensor is an object. Counted first, since parsing millions of anything takes seconds.
    if text.count(b"{") > max_tensors + 2:
        raise broken(f"its header describes more than {max_tensors} tensors")
    try:
        # numpy, of which nothing is used: for torch the library would also map the file into memory
        with _private(path, start + text, stamp[0]) as copy, safe_open(copy, framework="np") as opened:
            metadata = opened.metadata()
            parts = {name: opened.get_slice(name) for name in opened.offset_keys()}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except SafetensorError as error:
        raise broken("truncated, or no safetensors file?", f"{error}; ") from None
    if text.count(b"{") != len(found) + 1 + (metadata is not None):
        parse_json(text, path)  # a name stands there twice, or a brace in one
    header = Header(path, {}, {}, metadata or {}, stamp)
    begin = 8 + length  # one after another, as safe_open has checked
    for name, (code, shape) in found.items():
        if len(shape) > MAX_DIMS or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS or code not in DTYPES:
            rule = f"expected at most {MAX_DIMS} dimensions, {MAX_ELEMENTS} elements, and one of {', '.join(DTYPES)}"
            raise broken(rule, f"tensor {short(name)}: {code} of shape {short(shape)}, ")
        header.tensors[name] = tensor = torch.empty(shape, dtype=DTYPES[code], device="meta")
        header.begins[name] = begin
        begin += tensor.nbytes
    return header


def _stamp(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


@contextmanager
def _private(path: Any, head: bytes, size: int) -> Iterator[str]:
    """A file for a library that opens files by their names: our copy of a header and as long as the file it is from.
    Nobody exchanges it or cuts it short meanwhile, which would crash whoever has it mapped into memory. The file itself
    where the process may not have files of that length (RLIMIT_FSIZE): what is there can be read all the same."""
    if resource is not None and 0 <= resource.getrlimit(resource.RLIMIT_FSIZE)[0] < max(size, len(head)):
        yield os.fspath(path)
        return
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        handle = os.memfd_create("header", os.MFD_CLOEXEC)
        with os.fdopen(handle, "wb") as file:
            file.write(head)
            file.truncate(max(size, file.tell()))
            yield f"/proc/self/fd/{handle}"
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(head)
        file.truncate(max(size, file.tell()))
        yield file.name


def read_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors of a checked file into memory of their own: a mapped file that shrinks later would crash us."""
    tensors: dict[str, torch.Tensor] = {}
    with open_regular(header.path) as file:
        if _stamp(file) != header.stamp:
            rule = "changed while it was read"
            raise AdapterFileError(f"{header.path}: {rule}", f"{name_of(header.path)}: {rule}")
        for name in header.tensors if names is None else names:
            info = header.tensors[name]
            data = torch.empty(info.nbytes, dtype=torch.uint8)
            file.seek(header.begins[name])
            if info.nbytes and file.readinto(data.numpy()) != info.nbytes:  # type: ignore[attr-defined]
                rule = "ended inside a tensor (truncated?)"
                raise AdapterFileError(f"{header.path}: {rule}: {short(name)}", f"{name_of(header.path)}: {rule}")
            tensors[name] = data.view(info.dtype).view(info.shape)
    return tensors


def is_unchanged(header: Header) -> bool:
    """True while the file has the size and the time that it had when its header was read."""
    with open_regular(header.path) as file:
        return _stamp(file) == header.stamp


def check_finite(tensors: Mapping[str, torch.Tensor], where: object) -> None:
    """Raise if a floating-point tensor holds NaN or infinity, and name the tensors that do."""
    if bad := [name for name, tensor in tensors.items() if tensor.is_floating_point() and not all_finite(tensor)]:
        rule = "NaN or infinite values"
        raise AdapterFileError(f"{where}: {rule} in {list_some(bad)}", f"{rule} in {len(bad)} of its tensors")


def all_finite(tensor: torch.Tensor) -> bool:
    """True if no value is NaN or infinite. tensor: of any floating dtype; takes little memory beside it."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    # One sum a piece instead of a mask the size of the tensor (float64 holds the sum of any float32 values); only a sum
    # that overflows needs the mask. In pieces, since torch makes a float64 copy of all that it sums so.
    flat = tensor.reshape(-1)
    pieces = (flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE))
    return all(bool(p.sum(dtype=torch.float64).isfinite()) or bool(torch.isfinite(p).all()) for p in pieces)


def map_tensors(header: Header) -> dict[str, torch.Tensor]:
    """Tensors of a checked file as views of it, mapped into memory: read when they are used, and what is written to
    them stays in this process. Those that the file does not align for their dtype are copies.

    For files that nobody changes while they are in use: one that is cut short later would crash us.
    """
    whole = map_bytes(header.path, header.stamp[0])
    if not is_unchanged(header):
        rule = "changed while it was read"
        raise AdapterFileError(f"{header.path}: {rule}", f"{name_of(header.path)}: {rule}")
    tensors: dict[str, torch.Tensor] = {}
    for name, info in header.tensors.items():
        begin = header.begins[name]
        data = whole[begin : begin + info.nbytes]
        data = data.clone() if begin % info.dtype.itemsize else data
        tensors[name] = data.view(info.dtype).view(info.shape)
    return tensors


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file tensor by tensor, with no second copy of them in memory (the library's own makes one).

    Whoever maps it finds every tensor aligned for its dtype, and those of whole 64 bytes at multiples of 64.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda n: (tensors[n].nbytes % _ALIGNED != 0, -tensors[n].dtype.itemsize))
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        described[name] = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape),
                           "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(described).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data)
