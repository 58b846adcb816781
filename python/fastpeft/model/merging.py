"""Merging adapters into a whole model, taking them out again, and unloading: all layers or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config.base import PeftConfig
from ..config.types import warn
from ..files.progress import shown
from ..inject.modules import AdapterModule, adapter_layers, adapter_modules, set_child, walk
from ..inject.tokens import TrainableTokensWrapper
from ..layer.layer import AdapterLayer
from ..layer.saved_modules import ModulesToSaveWrapper
from ..methods.registry import method_of
from ..methods.tied import tied_names
from ..prompts.encoder import ENCODER


class ModelMerging(nn.Module):
    """A model with adapter layers, which merges them."""

    model: nn.Module
    peft_config: dict[str, PeftConfig]
    merge_errors: dict[str, float]  # of the last merge into quantised layers, by layer

    def adapter_modules(self) -> Iterator[tuple[str, AdapterModule]]:
        return adapter_modules(self.holder)

    @property
    def holder(self) -> nn.Module:
        """The module below which all adapters are: the model, or this, which has the prompts too."""
        return self if ENCODER in self._modules else self.model

    def adapter_layers(self, adapter: str | None = None) -> Iterator[tuple[str, AdapterLayer]]:
        return adapter_layers(self.model, adapter)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True if `convert_to_lora` can turn an adapter into a LoRA."""
        layers = [layer for _, layer in self.adapter_layers(adapter_name)]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (None: the active ones) into the base weights; `unmerge_adapter` brings the exact bytes back.

        That costs a second copy of each merged layer's weight, which is held until then. Into quantised layers the
        result is requantised; a warning reports the error, and `merge_errors` holds it by layer. safe_merge: raise
        ValueError if a merged weight is not finite. An error leaves every weight as it was.
        """
        layers = self._layers_to_merge(adapter_names)
        before = [(layer, list(layer.merged_adapters)) for _, layer in layers]
        try:
            found = {name: layer.merge(safe_merge=safe_merge, adapter_names=adapter_names) for name, layer in layers}
        except Exception:
            for layer, names in before:
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise
        self._report_errors(found)

    def _layers_to_merge(self, adapter_names: Sequence[str] | None) -> list[tuple[str, AdapterLayer]]:
        """All layers, once it is clear that the adapters are there and can be merged: unloading loses those that are
        not. PEFT merges nothing, without a word, for a name that there is not."""
        active: Any = self.active_adapters
        self._check_no_prompt(active if adapter_names is None else adapter_names)
        layers = list(self.adapter_layers())
        for _, layer in layers:
            layer.to_merge(adapter_names)
        known = self.peft_config.keys()
        if unknown := [name for name in adapter_names or () if name not in known]:
            raise ValueError(f"adapter_names has {unknown}, there are {list(known)}.")
        return layers

    def _report_errors(self, found: dict[str, float | None]) -> None:
        self.merge_errors = errors = {name: error for name, error in found.items() if error is not None}
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            warn(
                f"Merged into {len(errors)} quantised layers by requantising them: the relative error of the weights "
                f"is {sum(errors.values()) / len(errors):.2e} on average, {errors[worst]:.2e} at most ({worst}).",
                2,
            )

    def unmerge_adapter(self) -> None:
        """Undo every merge; the base weights have the exact bytes that they had before."""
        for _, layer in self.adapter_layers():
            if layer.merged_adapters:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge adapters and return the model without any adapter layer. Old weights are not kept.

        safe_merge: every layer's result is checked before the first is written, so that an error leaves every weight
        as it was.
        """
        layers = self._layers_to_merge(adapter_names)
        tied = tied_names(self.model)
        if safe_merge:
            for _, layer in layers:
                layer.check_safe(adapter_names)
        bar = shown(layers, "Unloading and merging model", progressbar)
        self._report_errors({name: layer.merge(adapter_names=adapter_names, keep=False) for name, layer in bar})
        self._unload(merged=True)
        self._tie(tied)
        self._untie()
        return self.model

    def unload(self) -> nn.Module:
        """The base model without any adapter layer."""
        if all(config.is_prompt_learning for config in self.peft_config.values()):
            self._check_no_prompt(self.peft_config)
        return self._unload(merged=False)

    def _check_no_prompt(self, names: Iterable[str]) -> None:
        """AttributeError, which a model without such methods gives, for adapters that are prompts."""
        configs = self.peft_config
        if prompts := [name for name in names if name in configs and configs[name].is_prompt_learning]:
            raise AttributeError(
                f"{', '.join(prompts)} is a prompt, which is in no layer: it cannot be merged or unloaded. "
                "`get_base_model()` gives the model without it."
            )

    def _unload(self, merged: bool) -> nn.Module:
        for site in reversed(list(walk(self.model))):  # what is nested comes out first
            module = site.module
            if isinstance(module, AdapterLayer):
                if not module.merged_adapters:
                    module.restore_base()
                set_child(site, module.base_layer)
            elif isinstance(module, ModulesToSaveWrapper):
                set_child(site, module.current() if merged else module.original_module)
            elif isinstance(module, TrainableTokensWrapper):
                set_child(site, module.token_adapter)
        for config in self.peft_config.values():
            method_of(config).settled(self.model, [])
        if "peft_config" in vars(self.model):
            del self.model.peft_config
        return self.model

    def _tie(self, tied: Mapping[str, str]) -> None:
        """Let modules, by name with the embeddings' name, share a weight again that a merge changed alike in both."""
        for name, leader in tied.items():
            one, other = (self.model.get_submodule(n) for n in (leader, name))
            w, v = one._parameters["weight"], other._parameters["weight"]
            if w is not None and v is not None and w is not v and w.shape == v.shape and torch.equal(w, v):
                other._parameters["weight"] = w

    def _untie(self) -> None:
        """A merge into tied embeddings changes one of the two; the model's configuration must not tie them again."""
        config = getattr(self.model, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or not hasattr(self.model, "get_input_embeddings"):
            return
        pair = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]  # type: ignore[operator]
        weights = [getattr(module, "weight", None) for module in pair]
        if all(isinstance(w, torch.Tensor) for w in weights) and weights[0].data_ptr() != weights[1].data_ptr():  # type: ignore[union-attr]
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            warn(
                "Input and output embeddings are no longer tied after merging. Setting `tie_word_embeddings=False` in "
                "the model config.",
                3,
            )
