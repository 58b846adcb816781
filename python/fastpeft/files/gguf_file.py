"""GGUF files: their header and table of tensors, checked before a tensor is used, and tensors as views of the file.

The package `gguf` knows the types and decodes them. Values stay in the file, mapped into memory.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .checks import AdapterFileError, name_of, open_regular, short
from .gguf_header import MAGIC, read_header
from .mapped import map_bytes

FLOATS = ("F32", "F16", "BF16", "F64")  # types that are no blocks


class GGUFPackageError(AdapterFileError, ImportError):
    """The optional package `gguf` is not installed."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file.

    quant: the name of its type in ggml, "Q4_1" or "F32". shape: as torch has it, rows first. begin: its first byte in
    the file. nbytes: how many there are.
    """

    name: str
    quant: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A checked header. tensors: by their names in the file. values: of its keys, the tokenizer's lists left out.
    tokens: how many its tokenizer has, None without one. stamp: size and time of the file that was read."""

    path: str
    tensors: dict[str, GGUFTensor]
    values: dict[str, Any]
    tokens: int | None
    stamp: tuple[int, int]
    _views: list[Tensor] = field(default_factory=list)

    def mapped(self) -> Tensor:
        """The bytes of the whole file, uint8: mapped, read when they are used; what is written to them stays in this
        process. Raises AdapterFileError where the file changed since its header was read."""
        if not self._views:
            self._views.append(map_bytes(self.path, self.stamp[0]))
        self.check_unchanged()
        return self._views[0]

    def bytes_of(self, name: str) -> Tensor:
        """A tensor's bytes as they lie, uint8."""
        found = self.tensors[name]
        return self.mapped()[found.begin : found.begin + found.nbytes]

    def check_unchanged(self) -> None:
        """Raise AdapterFileError unless the file has the size and the time that it had."""
        with open_regular(self.path) as file:
            if _stamp(file.fileno()) != self.stamp:
                rule = "changed while it was read"
                raise AdapterFileError(f"{self.path}: {rule}", f"{name_of(self.path)}: {rule}")

    def dense(self, name: str) -> Any:
        """A tensor's values as a numpy array of floats: a float type as it is, blocks decoded by the package gguf."""
        gguf = gguf_package()
        found = self.tensors[name]
        kind, data = gguf.GGMLQuantizationType[found.quant], self.bytes_of(name).numpy()
        if found.quant in ("F32", "F16", "F64"):
            return data.view(found.quant.replace("F", "<f").replace("32", "4").replace("16", "2").replace("64", "8")
                             ).reshape(found.shape)  # fmt: skip
        rows = math.prod(found.shape[:-1])
        try:
            return gguf.dequantize(data.reshape(rows, -1), kind).reshape(found.shape)
        except NotImplementedError:
            raise self.wrong(f"no decoder for tensor {short(name)} in {found.quant}") from None

    def check_finite(self, name: str, values: Tensor) -> None:
        """Raise AdapterFileError where a tensor's values are NaN or infinite."""
        if not bool(values.isfinite().all()):
            raise self.wrong(f"tensor {short(name)} has NaN or infinite values")

    def wrong(self, rule: str) -> AdapterFileError:
        """The error that names this file."""
        return AdapterFileError(f"{self.path}: {rule}", f"{name_of(self.path)}: {rule}")


def gguf_package() -> Any:
    """The package gguf; GGUFPackageError where it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise GGUFPackageError("GGUF files need the package gguf: pip install gguf (the extra `gguf` has it)")
    import gguf

    return gguf


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """True of a file that begins as GGUF files do."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read and check the header of a GGUF file; no tensor is read.

    Raises AdapterFileError for what is no GGUF file, is truncated, has another byte order, or holds a type that the
    package gguf does not know, and GGUFPackageError without that package.
    """
    gguf = gguf_package()
    where = os.fspath(path)

    def wrong(rule: str) -> AdapterFileError:
        return AdapterFileError(f"{where}: {rule}", f"{name_of(where)}: {rule}")

    with open_regular(where) as file:
        stamp = _stamp(file.fileno())
    try:
        header = read_header(where)
    except ValueError as error:
        raise wrong(str(error)) from None
    tensors: dict[str, GGUFTensor] = {}
    for one in header.tensors:
        try:
            kind = gguf.GGMLQuantizationType(one.quant)
        except ValueError:
            raise wrong(f"tensor {short(one.name)} is of type {one.quant}, which the package gguf does not know: a "
                        "newer one may (pip install -U gguf)") from None  # fmt: skip
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        shape = tuple(reversed(one.sizes))
        count = math.prod(shape)
        if not shape or shape[-1] % elements:
            raise wrong(f"tensor {short(one.name)}: {shape} has no form in {kind.name}, whose blocks have {elements}")
        found = GGUFTensor(one.name, kind.name, shape, one.begin, count // elements * size)
        if found.begin + found.nbytes > stamp[0]:
            raise wrong(f"truncated: tensor {short(one.name)} ends at byte {found.begin + found.nbytes}, the file has "
                        f"{stamp[0]}")  # fmt: skip
        tensors[one.name] = found
    made = GGUFFile(where, tensors, header.values, header.tokens, stamp)
    made.check_unchanged()
    return made


def _stamp(handle: int) -> tuple[int, int]:
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns
