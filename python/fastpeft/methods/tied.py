"""Modules that share their weight with the input embeddings, and what adapters of both share then."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config.targets import model_config, select
from ..config.types import PeftWarning


def embeddings_of(model: nn.Module, side: str = "input") -> nn.Module | None:
    """The layer that a transformers model calls its "input" or "output" embeddings; None of a model without one."""
    with suppress(AttributeError, NotImplementedError):  # so transformers says it
        found: Any = getattr(model, f"get_{side}_embeddings")()
        return found if isinstance(found, nn.Module) else None
    return None


def embedding_name(model: nn.Module) -> str | None:
    """The name of a model's input embeddings."""
    embeddings = embeddings_of(model)
    return next((name for name, module in model.named_modules() if module is embeddings and name), None)


def tied_names(model: nn.Module) -> Mapping[str, str]:
    """Modules whose weight is that of the input embeddings, by name, with the name of these; {} if none is tied."""
    name = embedding_name(model)
    weight = None if name is None else _weight(model.get_submodule(name))
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


def tied_fields(config: Any, model: nn.Module) -> dict[str, Any]:
    """Fields that `ensure_weight_tying` changes: the input embeddings stand for all that are tied to them."""
    tied, name = tied_names(model), embedding_name(model)
    saved, targets = config.modules_to_save or [], config.target_modules
    names = [name, *tied] if tied and name is not None else []
    if name is not None and any(n.endswith(tuple(saved)) for n in names):
        kept = [end for end in saved if not any(other.endswith(end) for other in tied)]
        return {"modules_to_save": kept if name.endswith(tuple(kept)) else [*kept, name]}
    if name is not None and select(targets, names):
        if isinstance(targets, str):
            return {} if select(targets, [name]) else {"target_modules": rf"(?:{targets}|{re.escape(name)})"}
        kept_targets = {end for end in targets if not select([end], list(tied))}
        return {"target_modules": kept_targets if select(kept_targets, [name]) else {*kept_targets, name}}
    if config.trainable_token_indices is None:
        where = "are added in either `modules_to_save` or `target_modules`" if tied else "were found in the model"
        text = f"You have requested `ensure_weight_tying`, but no tied modules {where}"
        warnings.warn(text, PeftWarning, stacklevel=5)
    return {}


def warn_tied(config: Any, model: nn.Module, adapted: Collection[str]) -> None:
    """Warn where an adapter changes a module whose weight another has too, and that other stays as it is."""
    if getattr(config, "ensure_weight_tying", False) or not model_config(model).get("tie_word_embeddings", False):
        return
    tied = tied_names(model)
    if not any(name in adapted for name in (*tied, *tied.values())):
        return
    can = hasattr(config, "ensure_weight_tying")
    why = "`ensure_weight_tying` is not set to True" if can else "no implementation exists to tie the adapters"
    text = f"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but {why}."
    warnings.warn(f"{text} Once merged, the layers no longer share a weight.", PeftWarning, stacklevel=5)


class Transposed(nn.Module):
    """A linear layer without a bias whose weight is the transposed entry of a container, wherever that moves."""

    bias = None

    def __init__(self, container: Any, adapter: str) -> None:
        super().__init__()
        self.__dict__["_entry"] = (container, adapter)  # no child: the container belongs to another layer

    @property
    def weight(self) -> Tensor:
        container, adapter = self.__dict__["_entry"]
        return container[adapter].t()  # type: ignore[no-any-return]

    def matrix(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the layer that the container belongs to loads it."""
