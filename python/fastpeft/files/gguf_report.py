"""Report of a GGUF file, a model or an adapter, from its header."""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import Any

from .gguf_file import GGUFFile, read_gguf

A_SUFFIX, B_SUFFIX = ".lora_a", ".lora_b"  # llama.cpp's


def inspect_gguf(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a GGUF file; no tensor is read.

    `type` is "model" or "adapter"; `types` has for each type of ggml how many tensors, elements and bytes there are;
    `tensors` their shapes, rows first, and types; `adapter`, None for a model, has the method, alpha, for each rank how
    many pairs there are, the scalings (alpha / rank) likewise, and its targets by their names within a block. Raises
    AdapterFileError for a broken file, and GGUFPackageError without the package gguf.
    """
    file = read_gguf(path)
    types: dict[str, dict[str, int]] = {}
    for one in file.tensors.values():
        found = types.setdefault(one.quant, {"tensors": 0, "elements": 0, "bytes": 0})
        found["tensors"] += 1
        found["elements"] += math.prod(one.shape)
        found["bytes"] += one.nbytes
    made = str(file.values.get("general.type", "model"))
    return {
        "path": file.path,
        "type": made,
        "architecture": str(file.values.get("general.architecture")),
        "name": file.values.get("general.name"),
        "types": types,
        "elements": sum(one["elements"] for one in types.values()),
        "bytes": sum(one["bytes"] for one in types.values()),
        "file_bytes": file.stamp[0],
        "tensors": {name: {"shape": list(one.shape), "type": one.quant} for name, one in file.tensors.items()},
        "adapter": _adapter(file) if made == "adapter" else None,
    }


def _adapter(file: GGUFFile) -> dict[str, Any]:
    ranks = {name.removesuffix(A_SUFFIX): t.shape[0] for name, t in file.tensors.items() if name.endswith(A_SUFFIX)}
    alpha = file.values.get("adapter.lora.alpha")
    targets = Counter(_target(name) for name in ranks)
    return {
        "method": file.values.get("adapter.type"),
        "alpha": alpha,
        "ranks": dict(Counter(ranks.values())),
        # llama.cpp takes 1 where alpha is 0
        "scalings": dict(Counter(alpha / r if alpha else 1.0 for r in ranks.values())),
        "targets": dict(sorted(targets.items())),
    }


def _target(name: str) -> str:
    """attn_q of blk.3.attn_q.weight."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "blk" and len(parts) > 2 else parts)
