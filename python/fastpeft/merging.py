"""Merging adapters into a layer's base weight and taking them out again, byte for byte."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import PeftWarning
from .method import AdapterView, LayerInfo, Method
from .sharded import is_sharded
from .weights.base import BaseWeight, Weight, wide


class Merging:
    """The part of `AdapterLayer` that reads and writes the base weight."""

    base_layer: nn.Module
    kind: type[BaseWeight]
    layer_name: str
    methods: dict[str, Method]
    merged_adapters: list[str]
    _active_adapter: list[str]
    _taken: dict[str, Any] | None

    @property
    def info(self) -> LayerInfo:
        raise NotImplementedError

    def view(self, adapter: str) -> AdapterView:
        raise NotImplementedError

    def changed(self) -> None:
        raise NotImplementedError

    def _views(self, adapter: str) -> tuple[AdapterView, AdapterView]:
        """The adapter's own tensors and the shared ones, which its layers hold in the same way."""
        view = self.view(adapter)
        return view, view

    def merged_weight(self, adapters: Sequence[str], base: Weight | None = None) -> Weight:
        """W and b, in at least float32, that the base layer has with these adapters merged in this order."""
        w, b = base or self.kind.read(self.base_layer)
        w = w.to(wide(w.dtype))
        return self._through(adapters, w, None if b is None else b.to(w.dtype))

    def stored_weight(self, adapters: Sequence[str]) -> Weight:
        """`merged_weight` in the base weight's own dtype."""
        return self._through(adapters, *self.kind.read(self.base_layer))

    def _through(self, adapters: Sequence[str], w: Tensor, b: Tensor | None) -> Weight:
        for name in adapters:
            method, views = self.methods[name], self._views(name)
            reason = method.mergeable_in(views[0], self.info)
            if reason:
                where = self.layer_name or "the layer"
                raise ValueError(f"The weight of {where} with adapter {name!r} in it is needed, but {reason}.")
            w, b = method.merged(*views, w, b)
        return w, b

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging an adapter alone adds to the base weight, in the layout of `base_layer.weight`."""
        with torch.no_grad():
            base = self._unmerged(self.kind.read)
            method = self.methods[adapter]
            if type(method).merged is Method.merged and not method.needs_base_weight:
                delta = method.delta_weight(*self._views(adapter), None).reshape(self.info.shape)
            else:
                delta = self.merged_weight([adapter], base)[0] - base[0]
        transposed = self.kind.fan_in_fan_out or self.kind.kind == "embedding"
        return delta.t() if transposed else delta

    def _unmerged(self, read: Any) -> Weight:
        """`read` of the base layer as it was before any merge."""
        if self._taken is None:
            return read(self.base_layer)  # type: ignore[no-any-return]
        now = self.kind.take(self.base_layer)
        self.kind.put_back(self.base_layer, self._taken)
        try:
            return read(self.base_layer)  # type: ignore[no-any-return]
        finally:
            self.kind.put_back(self.base_layer, now)

    def to_merge(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        """The adapters that `merge` would merge. Raises ValueError if one of them cannot be; changes nothing."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        wanted = self._active_adapter if adapter_names is None else adapter_names
        names = [n for n in wanted if n in self.methods and n not in self.merged_adapters]
        if names and any(is_sharded(p) for p in self.base_layer.parameters()):
            raise ValueError(
                f"{self.layer_name or 'The layer'} is sharded (FSDP2): save the adapter, and merge it in a model that "
                "is not."
            )
        for name in names:
            reason = self.methods[name].mergeable_in(self.view(name), self.info)
            if reason:
                raise ValueError(f"Adapter {name!r} cannot be merged into {self.layer_name or 'the layer'}: {reason}.")
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
        if not names:
            return None
        with torch.no_grad():
            # From the original, so that a second merge adds no second rounding.
            base = self._unmerged(self.kind.read)
            w, b = self.merged_weight([*self.merged_adapters, *names], base)
            if safe_merge:
                self._check_finite(names, w, b)
            taken = self._taken if self._taken is not None else self.kind.take(self.base_layer)
            try:
                error = self.kind.write(self.base_layer, w, b)
            except Exception:
                self.kind.put_back(self.base_layer, taken)
                raise
        self._taken = taken if keep else None
        self.merged_adapters.extend(names)
        self.changed()
        return error

    def check_safe(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise ValueError if merging would give NaN or infinity; changes nothing."""
        names = self.to_merge(adapter_names)
        if names:
            with torch.no_grad():
                base = self._unmerged(self.kind.read)
                self._check_finite(names, *self.merged_weight([*self.merged_adapters, *names], base))

    def _check_finite(self, names: Sequence[str], w: Tensor, b: Tensor | None) -> None:
        stored = self.kind.dtype(self.base_layer)  # a weight that is finite in float32 may overflow float16
        for tensor in (w, b):
            if tensor is not None and not torch.isfinite(tensor.to(stored)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights of {self.layer_name or 'the layer'}. "
                    f"The adapter {', '.join(names)} seems to be broken"
                )

    def unmerge(self) -> None:
        """Undo every merge: the exact bytes that the base weight had before are back."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=2)
            return
        if self._taken is None:
            raise ValueError("this layer was merged with keep=False, so its old weight is gone")
        self.kind.put_back(self.base_layer, self._taken)
        self._taken = None
        self.changed()
        self.merged_adapters.clear()
