"""Modules of a model that transformers' tensor parallelism splits: what its plan says of them, as weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..layer.layer import AdapterLayer
from ..weights.base import BaseWeight
from ..weights.dense import EmbeddingWeight, LinearWeight
from ..weights.find import weight_of
from ..weights.split import Split, SplitEmbeddingWeight, SplitLinearWeight, is_split
from .modules import Site

# Names of plans: the dimension of W [out, in] that is split, and what every process has of input and output.
STYLES = {
    "colwise": (0, False, False), "colwise_rep": (0, False, True), "colwise_gather_output": (0, False, True),
    "rowwise": (1, False, False), "rowwise_rep": (1, True, False), "rowwise_split_input": (1, True, False),
}  # fmt: skip
EMBEDDING_STYLES = {"embedding_rowwise": (1, False, False), "embedding_colwise": (0, False, True)}


def split_sites(model: nn.Module, sites: Mapping[str, Site], names: Iterable[str]) -> dict[str, Site]:
    """Sites of modules of a model whose weights processes split, out of those of `names`, with what they have of them.

    Raises ValueError for modules that are split in another way than by transformers' plans for linear layers and
    embeddings, which no adapter could follow.
    """
    found = {}
    for name in names:
        module = sites[name].module
        if not isinstance(module, AdapterLayer) and is_split(module):
            found[name] = replace(sites[name], base=_weight(name, sites[name].module, style_of(model, sites, name)))
    return found


def style_of(model: nn.Module, sites: Mapping[str, Site], name: str) -> str | None:
    """The style that the plan of a transformers model has for a module."""
    parts = name.split(".")
    for n in range(len(parts)):
        outer = sites[".".join(parts[:n])].module if n else model
        plan: Mapping[str, str] | None = getattr(outer, "_tp_plan", None)
        if plan and getattr(outer, "_device_mesh", None) is not None:
            return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", ".".join(parts[n:])))
    return None


def _weight(name: str, module: nn.Module, style: str | None) -> BaseWeight:
    weight: Any = module._parameters.get("weight")
    base = weight_of(module)
    table = EMBEDDING_STYLES if isinstance(base, EmbeddingWeight) else STYLES
    plain = type(base) in (EmbeddingWeight, LinearWeight) and hasattr(weight, "device_mesh")
    if not plain or weight.device_mesh.ndim != 1 or style not in table:
        over = getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None)
        raise ValueError(
            f"{name!r}, a {type(module).__name__}, is split among processes over {over} in the style {style!r}; "
            f"adapters can follow {', '.join(table)} of transformers' tensor parallelism alone, on dense layers."
        )
    split = Split(weight.device_mesh, *table[style or ""])
    return (SplitEmbeddingWeight if table is EMBEDDING_STYLES else SplitLinearWeight)(module, split)
