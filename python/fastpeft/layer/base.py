"""History of an adapter layer's base weight: the original, then the edits of adapters, then merged adapters.

Every change of it makes the weight anew from the first of these that stays, so that no number is rounded, or quantised,
twice, and going back restores the very objects that were there, byte for byte. For that the layer keeps the weight from
before the first edit and the one from before the first merge: one more copy of it for each of the two, the original in
the host's memory where it is dense and lives on an accelerator, and packed objects themselves where it is quantised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config.types import MergeError, warn
from ..files.offloaded import brought
from ..files.whole import is_sharded, is_unit
from ..methods.base_edit import BaseEdit
from ..methods.fused import Fused
from ..methods.method import AdapterView, Method
from ..weights.base import BaseWeight, LayerInfo, Saved, Weight, Wrapping, widened
from ..weights.find import weight_of
from .containers import ActiveAdapters

STILL_MERGED = "Cannot delete adapter(s) {} while they are merged. Please unmerge them first."


class MergingLayer(ActiveAdapters, Wrapping):
    """A base layer, the methods of adapters on it by name, and the base weight's history."""

    def __init__(self, base_layer: nn.Module, name: str = "", base: BaseWeight | None = None) -> None:
        super().__init__()
        found = base or weight_of(base_layer)
        if found is None:
            raise ValueError(f"{type(base_layer).__name__} has no weight that an adapter could act on")
        self.base_layer = base_layer
        self.layer_name = name
        self.methods: dict[str, Method] = {}
        self.base_edits: dict[str, BaseEdit] = {}  # by adapter, in the order in which they were made
        self._base = found.of(base_layer)
        self._unedited: Saved | None = None  # the base weight from before the first edit
        self._unmerged: Saved | None = None  # the same from before the first merge
        self._plan: Fused | None = None

    @property
    def base(self) -> BaseWeight:
        """The base layer's weight; of another class where the base layer was replaced."""
        base = self._base
        module = self._modules["base_layer"]
        if base.module is not module:
            assert module is not None
            found = None if base.transient or base.parallel else weight_of(module)
            self._base = base = found or base.of(module)
        return base

    @property
    def info(self) -> LayerInfo:
        return self.base.info(self.layer_name)

    @property
    def _shown(self) -> str:
        return self.layer_name or "the layer"

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.methods)

    def view(self, adapter: str) -> AdapterView:
        """The tensors and values of one adapter, as its method sees them."""
        return AdapterView(self, adapter)  # type: ignore[arg-type]  # every MergingLayer is an AdapterLayer

    def changed(self) -> None:
        """Have what was made for this layer made anew: its adapters, its base or its mode are others now."""
        self._plan = None

    def merged_weight(self, adapters: Sequence[str], base: Weight | None = None) -> Weight:
        """W and b, in at least float32, that the base layer has with these adapters merged in this order."""
        w, b = base or self.base.read()
        w = widened(w)
        return self._through(adapters, w, None if b is None else b.to(w.dtype))

    @property
    def acting(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self._active_adapter if name in self.methods]

    def merged_apart(self) -> Weight:
        """W and b, in at least float32, with the active adapters merged, to be written elsewhere: the layer stays as it
        is, and may be one that nothing can be merged into. Raises ValueError for NaN and infinity, and for adapters
        that cannot be merged."""
        with torch.no_grad(), self._evaluating():
            w, b = self.merged_weight(self.check_active(self.acting), self.unmerged_weight())
        self._check_finite(self.acting, w, b)
        return w, b

    def stored_weight(self, adapters: Sequence[str]) -> Weight:
        """`merged_weight` in the base weight's own dtype."""
        return self._through(adapters, *self.base.read())

    def _given(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Within this, the module below computes with these adapters: beside its parameter where it can, or in it."""
        base: Any = self.base
        if len(names) == 1 and base.takes_factors:
            factors = self.methods[names[0]].expert_factors(self.view(names[0]))
            if factors is not None:
                return base.with_factors(factors)  # type: ignore[no-any-return]
        return self.base.replaced(*self.stored_weight(names))

    def current_weight(self) -> Weight:
        """W and b that the layer computes with now, for modules that read them. As a forward, it unmerges a layer whose
        adapters are off."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        off = self._disable_adapters or self.merged_adapters
        return self.stored_weight([] if off else [n for n in self._active_adapter if n in self.methods])

    def _through(self, adapters: Sequence[str], w: Tensor, b: Tensor | None) -> Weight:
        for name in adapters:
            method, view = self.methods[name], self.view(name)
            if reason := method.mergeable_in(view, self.info):
                raise ValueError(f"The weight of {self._shown} with adapter {name!r} in it is needed, but {reason}.")
            w, b = method.merged(view, view, w, b)
        return w, b

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Context in which no adapter drops or draws anything, as in evaluation, for a weight that stays."""
        inside = set(self.modules()).difference(self.base_layer.modules())
        training = [module for module in inside if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Difference that merging an adapter alone makes to the base weight, in the layout of `base_layer.weight`."""
        with torch.no_grad(), self._evaluating():
            base = self.unmerged_weight()
            method, view = self.methods[adapter], self.view(adapter)
            if type(method).merged is Method.merged and not method.needs_base_weight:
                delta = method.delta_weight(view, view, None).reshape(base[0].shape)
            elif not method.mergeable and (factors := method.factors(view, view, base[0])) is not None:
                delta = (factors[1] @ factors[0]).reshape(base[0].shape)  # aLoRA's, of some tokens alone
            else:
                delta = self.merged_weight([adapter], base)[0] - base[0]
        return delta.t() if self.base.transposed else delta

    def unmerged_weight(self) -> Weight:
        """W and b as they were before any merge."""
        return self._read(self._unmerged)

    def original_weight(self) -> Weight:
        """W and b as they were before any edit."""
        return self._read(self._unedited or self._unmerged)

    def _read(self, saved: Saved | None) -> Weight:
        base = self.base
        if saved is None:
            return base.read()
        with brought(base.holder):
            now = base.save()
            base.restore(saved)
            try:
                return base.read()
            finally:
                base.restore(now)

    def removed_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """P and Q of what an adapter's edit removed from the weight that it found, if it is of a low rank."""
        before = itertools.takewhile(lambda name: name != adapter, self.base_edits)
        with torch.no_grad():
            w = _edited(self.original_weight()[0], [self.base_edits[name] for name in before])
            return self.base_edits[adapter].removed_factors(w)

    def _remake(
        self, merged: Sequence[str], edits: Mapping[str, BaseEdit] | None = None, keep: bool = True, safe: bool = False
    ) -> float | None:
        """Make the base weight anew: the original with `edits` (None: those that it has), then with these adapters
        merged. An error leaves it as it was. keep, safe, and what is returned: as in `merge`.
        """
        if self.merged_adapters and self._unmerged is None:
            raise ValueError("this layer was merged with keep=False, so its old weight is gone")
        with brought(self.base.holder, changes=True):
            return self._made_anew(merged, edits, keep, safe)

    def _made_anew(
        self, merged: Sequence[str], edits: Mapping[str, BaseEdit] | None, keep: bool, safe: bool
    ) -> float | None:
        base, error = self.base, None
        now, unedited, unmerged = base.save(), self._unedited, self._unmerged
        parameters: dict[str, Any] = self.base_layer._parameters
        trained = {name: p.requires_grad for name, p in parameters.items() if p is not None}
        try:
            with torch.no_grad():
                if unmerged is not None:
                    base.restore(unmerged)
                    unmerged = None
                if edits is not None:
                    unedited = self._edit(edits)
                if merged:
                    with self._evaluating():
                        w, b = self.merged_weight(merged)
                    if safe:
                        self._check_finite([n for n in merged if n not in self.merged_adapters], w, b)
                    unmerged = base.save() if keep else None
                    error = base.write(w, b)
        except Exception:
            base.restore(now)
            raise
        for name, p in parameters.items():
            if p is not None and p.requires_grad != trained.get(name, p.requires_grad):
                p.requires_grad_(trained[name])
        self._unedited, self._unmerged = unedited, unmerged
        if edits is not None:
            left = dict(edits)
            self.base_edits.clear()
            self.base_edits.update(left)
        self.merged_adapters = list(merged)
        self.changed()
        return error

    def _edit(self, edits: Mapping[str, BaseEdit]) -> Saved | None:
        """Make the unmerged base weight what these edits make of the original, which is returned if it is to be kept.
        The bias is no edit's: it stays."""
        base = self.base
        found = base.save()
        original = self._unedited or found
        base.restore({**original, **({"bias": found["bias"]} if "bias" in found else {})})
        if not edits:
            return None
        w = base.read()[0]
        if w.is_meta:
            raise ValueError(f"an adapter changes the weight of {self.layer_name!r}, which is on the meta device")
        base.write(_edited(w, edits.values()), None)
        return {name: _on_host(value) for name, value in original.items()}

    def no_lora_form(self, adapter: str) -> str | None:
        """The reason why no LoRA does in this layer what an adapter does; None where one can."""
        info = self.info
        if self.base.parallel:
            return "processes split it: save the adapter and convert it in a model that is whole"
        if info.transient or info.groups > 1 or info.kind not in ("linear", "embedding", "conv1d", "conv2d", "conv3d"):
            return f"a {type(info.module).__name__} as this one has no LoRA that could do the same"
        return self.methods[adapter].mergeable_in(self.view(adapter), info)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True if `convert_to_lora` can turn an adapter of this layer into a LoRA."""
        return adapter_name in self.methods and self.no_lora_form(adapter_name) is None

    def check_active(self, adapter_names: Sequence[str]) -> list[str]:
        """The adapters, as a list. Raises ValueError for those that cannot act, or be merged, at once."""
        found: dict[type[Method], list[str]] = {}
        for name in adapter_names if len(adapter_names) > 1 else ():
            if name in self.methods:
                found.setdefault(type(self.methods[name]), []).append(name)
        for names in found.values():
            if len(names) > 1:
                self.methods[names[0]].check_together([self.view(name) for name in names])
        return list(adapter_names)

    def to_merge(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        """The adapters that `merge` would merge. Raises ValueError if one of them cannot be; changes nothing."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        wanted = self._active_adapter if adapter_names is None else adapter_names
        names = [n for n in wanted if n in self.methods and n not in self.merged_adapters]
        whole = self.base.parallel or not names
        if not whole and (any(map(is_sharded, self.parameters())) or any(map(is_unit, self.modules()))):
            raise ValueError(f"{self._shown} is sharded: save the adapter and merge it in a model that is not.")
        if names and self.base.refusal:
            raise MergeError(f"Adapters cannot be merged into {self._shown}: {self.base.refusal}.")
        if names:
            self.check_active([*self.merged_adapters, *names])
        for name in names:
            if reason := self.methods[name].mergeable_in(self.view(name), self.info):
                raise MergeError(f"Adapter {name!r} cannot be merged into {self._shown}: {reason}.")
        return names

    def merge(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, keep: bool = True
    ) -> float | None:
        """Merge adapters (None: the active ones) into the base weight, after those that are merged already.

        safe_merge: raise ValueError, with nothing changed, if the result holds NaN or infinity. keep: hold on to the
        old weight so that `unmerge` restores its exact bytes; this costs a second copy of the layer's weight. Returns
        the relative error that requantising made, for a quantised layer.
        """
        names = self.to_merge(adapter_names)
        if self.merged_adapters:
            there = f"Already following adapters were merged {','.join(self.merged_adapters)}. You are now"
            more = f"{there} additionally merging {','.join(names)}."
            warn(more if names else "All adapters are already merged, nothing to do.")
        return self._remake([*self.merged_adapters, *names], keep=keep, safe=safe_merge) if names else None

    def check_safe(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if merging would give NaN or infinity; changes nothing."""
        names = self.to_merge(adapter_names)
        if names:
            with torch.no_grad(), self._evaluating():
                merged = self.merged_weight([*self.merged_adapters, *names], self.unmerged_weight())
            self._check_finite(names, *merged)

    def _check_finite(self, names: Sequence[str], w: Tensor, b: Tensor | None) -> None:
        stored = self.base.dtype  # a weight that is finite in float32 may overflow float16
        for what, tensor in (("", w), (": NaNs detected in the merged bias", b)):
            if tensor is not None and not torch.isfinite(tensor.to(stored)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken "
                    f"(in {self._shown}{what})."
                )

    def unmerge(self) -> None:
        """Undo every merge: the exact bytes that the base weight had before are back."""
        if not self.merged_adapters:
            warn("Already unmerged. Nothing to do.")
            return
        self._remake([])

    def edit_base(self, adapter: str, edit: BaseEdit) -> None:
        """Change the base weight for an adapter. An error leaves it as it was."""
        self.check_edit(edit)
        self._remake([], {**self.base_edits, adapter: edit})

    def check_edit(self, edit: BaseEdit) -> None:
        """Raise ValueError while the base weight cannot be changed; warn if that changes what adapters here compute."""
        if self.merged_adapters:
            raise ValueError(
                f"{self._shown} has merged adapters ({', '.join(self.merged_adapters)}): an adapter that changes the "
                "base weight can only be added after `unmerge_adapter`."
            )
        if any(not edit.once or self.base_edits.get(name) != edit for name in self.methods):
            warn(
                "The new adapter changes base weights on which other adapters act: what these compute changes with it. "
                "Save such adapters as plain LoRAs (path_initial_model_for_weight_conversion) to use several at once."
            )

    def restore_base(self, adapter: str | None = None) -> None:
        """Take back what was changed for an adapter (None: for all), whatever was changed after it."""
        self.set_edits({name: edit for name, edit in self.base_edits.items() if adapter not in (None, name)})

    def set_edits(self, edits: Mapping[str, BaseEdit]) -> None:
        """Make the base weight what these edits, and the adapters that are merged, make of the original."""
        if edits != self.base_edits:
            self._remake(self.merged_adapters, edits)


def _edited(w: Tensor, edits: Iterable[BaseEdit]) -> Tensor:
    """W after edits, in at least float32."""
    w = widened(w)
    made: list[BaseEdit] = []
    for edit in edits:
        if not edit.once or edit not in made:
            w = edit(w)
            made += [edit] if edit.once else []
    return w


def _on_host(value: Any) -> Any:
    """A dense parameter of an accelerator, in host memory: the device's is not spent on a second copy."""
    if type(value) is not nn.Parameter or value.device.type in ("cpu", "meta"):
        return value
    return nn.Parameter(value.detach().to("cpu"), requires_grad=value.requires_grad)
