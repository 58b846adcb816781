"""The safetensors files of one model: their headers, checked before a tensor is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .checks import AdapterFileError, name_of, read_json
from .safetensors import Header, read_header

INDEX_NAME = "model.safetensors.index.json"
# A shard's header names every tensor of a part of the model; 100 MB is the format's own limit.
_MAX_HEADER = 100_000_000
_MAX_TENSORS = 1 << 20
_MAX_INDEX = 64 << 20


def weight_map(folder: Path) -> Mapping[str, str]:
    """The file of each tensor as a folder's index has it; empty without an index."""
    index = folder / INDEX_NAME
    found = read_json(index, _MAX_INDEX).get("weight_map", {}) if index.is_file() else {}
    if not isinstance(found, dict):
        raise AdapterFileError(f"{index}: its weight_map is no json object")
    return {str(key): str(file) for key, file in found.items()}


def read_shards(paths: Iterable[str | os.PathLike[str]]) -> list[Header]:
    """Headers of all files. Raises AdapterFileError that names a file which is broken or has a tensor of another."""
    headers: list[Header] = []
    owner: dict[str, str] = {}
    for path in paths:
        header = read_header(path, _MAX_HEADER, _MAX_TENSORS)
        for key in header.tensors:
            if key in owner:
                raise AdapterFileError(f"{path}: {key} is in {owner[key]} too", f"{name_of(path)}: a tensor is twice")
            owner[key] = name_of(path)
        headers.append(header)
    return headers


def check_index(headers: Iterable[Header], index: Mapping[str, str]) -> None:
    """Raise AdapterFileError that names a file which lacks a tensor that the index says it has."""
    held = {name_of(header.path): header for header in headers}
    for key, file in index.items():
        header = held.get(os.path.basename(file))
        if header is not None and key not in header.tensors:
            raise AdapterFileError(f"{header.path}: it lacks {key}, which {INDEX_NAME} says it has")
