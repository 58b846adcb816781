"""Modules that share their weight with the input embeddings, and what adapters of both share then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .sites import model_config


def input_embeddings(model: nn.Module) -> nn.Module | None:
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def embedding_name(model: nn.Module) -> str | None:
    """The name of a model's input embeddings."""
    embeddings = input_embeddings(model)
    return next((name for name, module in model.named_modules() if module is embeddings and name), None)


def tied_names(model: nn.Module) -> Mapping[str, str]:
    """Modules whose weight is that of the input embeddings, by name, with the name of these; {} if none is tied."""
    embeddings, name = input_embeddings(model), embedding_name(model)
    weight = None if embeddings is None else _weight(embeddings)
    if name is None or weight is None or not model_config(model).get("tie_word_embeddings", False):
        return {}
    return {
        other: name
        for other, module in model.named_modules()
        if other != name and not other.endswith((".base_layer", ".token_adapter")) and not other.startswith(f"{name}.")
        and _weight(module) is weight
    }  # fmt: skip


def _weight(module: nn.Module) -> nn.Parameter | None:
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module._parameters.get("weight")
