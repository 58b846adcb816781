"""GGUF files that are written whole or not at all, one tensor in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .atomic import atomic_file
from .checks import AdapterFileError, name_of, short
from .gguf_file import GGUFFile, GGUFPackageError, gguf_package


@dataclass(frozen=True)
class GGUFValue:
    """The value of a key. type, sub_type: names of gguf's, "STRING" or "FLOAT32"; sub_type: of an array's elements."""

    value: Any
    type: str
    sub_type: str | None = None


@dataclass(frozen=True)
class GGUFPart:
    """A tensor to write. quant: the name of its type in ggml. shape: rows first. make: its bytes, as a numpy array of
    any dtype and shape, asked for when they are written."""

    quant: str
    shape: tuple[int, ...]
    make: Callable[[], Any]


def write_gguf_file(
    path: str | os.PathLike[str], architecture: str, values: Mapping[str, GGUFValue], parts: Mapping[str, GGUFPart]
) -> None:
    """Write a file of these keys and tensors.

    Raises WriteError where there is no room, AdapterFileError for a tensor whose bytes are not those of its type, and
    GGUFPackageError where the package gguf is missing or too old; then nothing is written, and a file that was there
    stays as it was.
    """
    gguf = gguf_package()
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            for key, one in values.items():
                _add_value(gguf, writer, key, one)
            sizes = {name: _add_part(gguf, writer, name, part, path) for name, part in parts.items()}
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            # not by the package's own loop: numpy's `tofile` does not say why a write failed
            for name, part in parts.items():
                data = np.ascontiguousarray(part.make())
                if data.nbytes != sizes[name]:
                    rule = f"tensor {short(name)}: {data.nbytes} bytes for {part.shape} in {part.quant}"
                    raise AdapterFileError(f"{path} is not written: {rule}", f"{name_of(path)}: {rule}")
                file.write(data.view(np.uint8).data)
                writer.write_padding(file, data.nbytes)
            file.flush()
            os.fsync(file.fileno())
        finally:
            writer.close()


def values_of(file: GGUFFile) -> dict[str, GGUFValue]:
    """All keys of a file, the tokenizer's among them, to be written again; strings as bytes. Raises AdapterFileError
    for what the package gguf does not write."""
    gguf = gguf_package()
    found: dict[str, GGUFValue] = {}
    for key, one in gguf.GGUFReader(file.path).fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":  # of the header, and the writer's own
            continue
        main, last = one.types[0].name, one.types[-1].name
        if main == "STRING":
            found[key] = GGUFValue(one.parts[-1].tobytes(), main)
        elif main != "ARRAY":
            found[key] = GGUFValue(one.parts[-1].tolist()[0], main)
        elif len(one.types) != 2 or not len(one.data):
            raise file.wrong(f"its key {short(key)} is an array of no elements or of arrays, which the package gguf "
                             "does not write")  # fmt: skip
        elif last == "STRING":
            found[key] = GGUFValue([one.parts[i].tobytes() for i in one.data], main, last)
        else:
            found[key] = GGUFValue([v for i in one.data for v in one.parts[i].tolist()], main, last)
    file.check_unchanged()
    return found


def _add_value(gguf: Any, writer: Any, key: str, one: GGUFValue) -> None:
    if key == "general.alignment":
        writer.add_custom_alignment(one.value)
        return
    types = gguf.GGUFValueType
    if one.sub_type is None:
        writer.add_key_value(key, one.value, types[one.type])
        return
    try:
        writer.add_key_value(key, one.value, types[one.type], types[one.sub_type])
    except TypeError:
        raise GGUFPackageError("arrays of a given type need a newer package gguf: pip install -U gguf") from None


def _add_part(gguf: Any, writer: Any, name: str, part: GGUFPart, path: str | os.PathLike[str]) -> int:
    """The size of a tensor's bytes, which the header has from now on."""
    kind = gguf.GGMLQuantizationType[part.quant]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    if part.shape[-1] % elements:
        rule = f"tensor {short(name)}: rows of {part.shape[-1]} elements have no form in {part.quant}, whose blocks " \
               f"have {elements}"  # fmt: skip
        raise AdapterFileError(f"{path} is not written: {rule}", f"{name_of(path)}: {rule}")
    nbytes: int = math.prod(part.shape) // elements * size
    writer.add_tensor_info(name, part.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    return nbytes
