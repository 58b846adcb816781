"""Quantised models that are kept: made once of a folder with dense weights, and opened by mapping from then on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import atomic_directory
from ..files.checks import AdapterFileError, list_some, read_json
from ..files.safetensors import write_tensors
from .load_nf4 import load_nf4_model
from .quantize import nf4_config

NOTE_NAME = "fastpeft_quantised_from.json"
_VERSION = 1


def load_cached_model(
    directory: str | os.PathLike[str], cache: str | os.PathLike[str], dtype: torch.dtype | None = None,
    auto_class: Any = None, say: Callable[[str], object] | None = None, settings: dict[str, Any] | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """The 4-bit model of a folder with dense safetensors, out of the folder `cache`, which is made when it is not there
    or was made of other files or with other settings.

    dtype: of what stays dense; default: the configuration's. settings: arguments of `quantize_model`. auto_class,
    options: of transformers, and of its `from_pretrained`. say: is told what is done, a line each. What is opened stays
    in its file, mapped into memory; nobody should write into `cache` meanwhile. Raises AdapterFileError that names a
    broken file of the source, and WriteError where there is no room for the cache: nothing half-written is left.
    """
    import transformers

    root, place, told = Path(directory), Path(cache), say or (lambda line: None)
    auto_class = auto_class or transformers.AutoModelForCausalLM
    if dtype is None:
        dtype = transformers.AutoConfig.from_pretrained(root).dtype or torch.float32
    made_of = identity(root, dtype, settings or {})
    why = _why_not(place, made_of)
    if why is None:
        try:
            model = load_nf4_model(place, dtype, auto_class=auto_class, mapped=True, **options)
            told(f"opened the quantised model in {place}")
            model.name_or_path = model.config._name_or_path = str(root)
            return model
        except (AdapterFileError, OSError, RuntimeError) as error:
            why = f"it cannot be read: {error}"
    told(f"quantising {root}" + (f"; {place} is made again: {why}" if why else ""))
    config = nf4_config(**(settings or {}), strict=True)
    model = auto_class.from_pretrained(root, dtype=dtype, quantization_config=config, **options)
    if identity(root, dtype, settings or {}) != made_of:
        raise AdapterFileError(f"{root}: changed while it was read")
    keep(model, place, made_of)
    told(f"kept the quantised model in {place}")
    return model


def identity(root: Path, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    """The source of a quantised model: names, sizes and times of its files, its configuration's hash, settings."""
    files = sorted(file for pattern in ("*.safetensors", "*.bin", "*.index.json") for file in root.glob(pattern))
    stats = {file.name: file.stat() for file in files}
    described = (root / "config.json").read_bytes()
    return {
        "version": _VERSION,
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
        "config": hashlib.sha256(described).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "settings": json.loads(json.dumps(settings)),
    }


def _why_not(place: Path, made_of: dict[str, Any]) -> str | None:
    """The reason why a folder is not of these files and settings; empty where there is none, None where it is."""
    note = place / NOTE_NAME
    if not note.is_file():
        return ""
    try:
        found = read_json(note)
    except (AdapterFileError, OSError) as error:
        return str(error)
    if found == made_of:
        return None
    if found.get("version") != _VERSION:
        return "it is of another version"
    if found.get("files") != made_of["files"]:
        then, now = found.get("files"), made_of["files"]
        other = [n for n in now if not isinstance(then, dict) or then.get(n) != now[n]]
        return f"the source changed ({list_some(other, 2) or 'fewer files'})"
    other = [name for name in ("config", "dtype", "settings") if found.get(name) != made_of[name]]
    return f"{list_some(other)} changed"


def keep(model: Any, place: Path, made_of: dict[str, Any]) -> None:
    """Write a quantised model as a folder that `load_nf4_model` opens; whole or not at all (WriteError)."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for key, tensor in state.items():
        first.setdefault(id(tensor), key)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {key: tensor for key, tensor in state.items() if first[id(tensor)] == key or key not in tied}
    with atomic_directory(place, keep=False) as temporary:
        write_tensors(temporary / "model.safetensors", kept)
        model.config.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        (temporary / NOTE_NAME).write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")
