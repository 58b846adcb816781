"""`trainable_token_indices`: rows of an embedding that are trained beside an adapter of another method.

The embedding is wrapped, and the layer inside the wrapper holds the trained rows: an adapter layer like any other,
found as `<module>.token_adapter`, which gives PEFT's keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config.types import warn
from ..layer.layer import AdapterLayer
from ..layer.saved_modules import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from ..methods.tied import embedding_name, tied_names
from .modules import LayerPlan, Site, checked_info


class TrainableTokensWrapper(AuxiliaryTrainingWrapper, nn.Module):
    """A module in the place of an embedding (or output head) whose rows adapters train."""

    def __init__(self, layer: AdapterLayer) -> None:
        super().__init__()
        self.token_adapter = layer
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "token_adapter":
                raise
        return getattr(self.token_adapter.base_layer, name)

    @property
    def base_layer(self) -> nn.Module:
        return self.token_adapter.base_layer

    original_module = base_layer

    def adapter_state(self, adapter: str) -> Iterator[tuple[str, str, Tensor]]:
        for memory, file, tensor in self.token_adapter.adapter_state(adapter):
            yield f"token_adapter.{memory}", f"token_adapter.{file}", tensor

    @property
    def weight(self) -> Any:
        """With the active rows in it, for models that read it rather than call the module."""
        layer = self.token_adapter
        acts = layer.methods.keys() & set(layer.active_adapters)
        if layer.disable_adapters != layer.merged or not (acts or layer.merged):
            return layer.weight
        w = layer.current_weight()[0]
        return w.t() if layer.base.transposed else w

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        """Those of the active adapters that train rows here."""
        return [name for name in self.token_adapter.active_adapters if name in self.token_adapter.methods]

    def _get_available_adapters(self) -> set[str]:
        return self.token_adapter._get_available_adapters()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        self.token_adapter.set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        self.token_adapter.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        self.token_adapter.delete_adapter(adapter_name)
        if new_active_adapters:
            self.set_adapter(new_active_adapters)


@dataclass
class TokenPlan(LayerPlan):
    """Trained rows of one module. outer: where the wrapper goes; site: where the layer goes, in the wrapper."""

    outer: Site
    wrapper: TrainableTokensWrapper
    leader: str | None  # the module whose rows these are


def embeddings_end(model: nn.Module) -> str:
    """The end of the names of the modules whose rows a list of indices alone means."""
    return embedding_name(model) or "embed_tokens"


def plan_tokens(model: nn.Module, config: Any, sites: Mapping[str, Site], targeted: Collection[str]) -> list[TokenPlan]:
    """The trained rows that a configuration asks for beside its adapter in the modules `targeted`; changes nothing."""
    if (wanted := getattr(config, "trainable_token_indices", None)) is None:
        return []
    from ..methods.registry import get_method
    from ..methods.trainable_tokens import FollowingTokens, TrainableTokensConfig

    asked = dict(wanted) if isinstance(wanted, Mapping) else {embeddings_end(model): wanted}
    tokens: dict[str, list[int]] = {}
    for end, indices in asked.items():
        if end in (config.modules_to_save or ()):
            raise ValueError(
                f"The embedding layer is already marked to be trained fully: name {end!r} either in `modules_to_save` "
                "or in `trainable_token_indices`, not in both."
            )
        if not (found := [name for name in sites if name.endswith(end)]):
            raise ValueError(f"Target modules {{{end!r}}} not found in the base model. (trainable_token_indices)")
        tokens.update(dict.fromkeys(found, indices))
    leaders = _leaders(tied_names(model), tokens, config)
    method, following = get_method("TRAINABLE_TOKENS"), FollowingTokens()
    configs = {n: TrainableTokensConfig(token_indices=i) for n, i in tokens.items() if n not in leaders}
    configs.update({n: configs[leader] for n, leader in leaders.items()})
    plans = []
    for name, own in configs.items():
        module, site = sites[name].module, sites[name]
        if isinstance(module, (AdapterLayer, ModulesToSaveWrapper)) or name in targeted:
            raise TypeError(f"trainable_token_indices cannot be applied to modules of type {type(module)}")
        method.check_config(own)
        held = module if isinstance(module, TrainableTokensWrapper) else None
        inner = Site(f"{name}.token_adapter", held.token_adapter if held else module, held, "token_adapter")
        info = checked_info(inner)
        method.check_layer(own, info)
        layer = held.token_adapter if held else AdapterLayer(module, inner.name).train(module.training)
        leader, state = leaders.get(name), method.make_state(own, info, None)
        acts = following if leader else method
        plans.append(TokenPlan(inner, layer, state, acts, site, held or TrainableTokensWrapper(layer), leader))
    return plans


def _leaders(tied: Mapping[str, str], tokens: Mapping[str, list[int]], config: Any) -> dict[str, str]:
    """Tied modules that follow the input embeddings' rows: all but those that name other rows."""
    if (ensure := getattr(config, "ensure_weight_tying", False)) and not tied:
        message = "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). "
        warn(f"{message}Weight tying will not be applied for trainable_token_indices.", level=4)
    leaders = {}
    for other, name in tied.items():
        if name in tokens and tokens.get(other, tokens[name]) == tokens[name]:
            leaders[other] = name
        elif name in tokens and ensure:
            raise ValueError(
                "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
                f"layers: {name}: {tokens[name]}, {other}: {tokens[other]}."
            )
    return leaders
