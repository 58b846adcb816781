"""Adapters that change the base weight when they are put in, and the way back (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA).

A method's `make_state` puts a `BaseEdit` under the key `EDIT`; the layer carries it out when the adapter goes in, and
takes it back, byte for byte, when the adapter is deleted or unloaded. For that it keeps the weight as it was: one more
copy of each edited layer's weight, in the host's memory where the weight is dense and lives on an accelerator, and as
the packed objects themselves where it is quantised.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .config import PeftWarning
from .weights.base import BaseWeight, wide

EDIT = "base_edit"


class BaseEdit(Protocol):
    @property
    def used(self) -> tuple[str, ...]:
        """Attributes of the base layer that served to make the adapter, to be dropped once it is in."""

    @property
    def once(self) -> bool:
        """Whether an equal edit of another adapter is not to be made again."""

    def __call__(self, w: Tensor) -> Tensor:
        """The new W for W as the law names it, in at least float32."""

    def taken(self, w: Tensor) -> tuple[Tensor, Tensor] | None:
        """P [out, r] and Q [r, in] with W - P Q the new W, if there are such of a low rank."""


@dataclass(frozen=True)
class LowRankEdit:
    """W - P Q, with P [out, r] and Q [r, in]."""

    p: Tensor
    q: Tensor
    used: tuple[str, ...] = ()
    once: ClassVar[bool] = False

    def __call__(self, w: Tensor) -> Tensor:
        return w - (self.p.to(w) @ self.q.to(w)).reshape(w.shape)

    def taken(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.p.to(w), self.q.to(w)


class BaseEdits:
    """The part of `AdapterLayer` that edits the base weight."""

    base_layer: nn.Module
    kind: type[BaseWeight]
    layer_name: str
    methods: dict[str, Any]
    merged_adapters: list[str]
    base_edits: Mapping[str, BaseEdit] = {}  # by adapter, in the order in which they were made; replaced, never changed
    _original: dict[str, Any] | None = None  # the base weight before the first edit

    def changed(self) -> None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: Any = None, keep: bool = True) -> float | None:
        raise NotImplementedError

    def edit_base_for(self, adapter: str, state: Mapping[str, Any]) -> None:
        """Carry out the edit in an adapter's new state, if any, in place of that of an adapter of the same name."""
        if EDIT in state:
            self.edit_base(adapter, state[EDIT])
        elif adapter in self.methods:
            self.restore_base(adapter)

    def edit_base(self, adapter: str, edit: BaseEdit) -> None:
        """Change the base weight for an adapter. An error leaves it as it was."""
        self.check_edit(edit)
        self._rewrite({**self.base_edits, adapter: edit})

    def check_edit(self, edit: BaseEdit) -> None:
        """Raise ValueError while the base weight cannot be changed; warn if that changes what adapters here compute."""
        if self.merged_adapters:
            raise ValueError(
                f"{self.layer_name or 'The layer'} has merged adapters ({', '.join(self.merged_adapters)}): an adapter "
                "that changes the base weight can only be added after `unmerge_adapter`."
            )
        if any(not edit.once or self.base_edits.get(name) != edit for name in self.methods):
            warnings.warn(
                "The new adapter changes base weights on which other adapters act: what these compute changes with it. "
                "Save such adapters as plain LoRAs (path_initial_model_for_weight_conversion) to use several at once.",
                PeftWarning,
                stacklevel=2,
            )

    def restore_base(self, adapter: str | None = None) -> None:
        """Take back what was changed for an adapter (None: for all), whatever was changed after it."""
        left = {name: edit for name, edit in self.base_edits.items() if adapter not in (None, name)}
        if len(left) == len(self.base_edits):
            return
        merged = list(self.merged_adapters)
        if merged:
            self.unmerge()
        self._rewrite(left)
        if merged:
            self.merge(adapter_names=merged)

    def taken_from_base(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """P and Q of what an adapter's edit took from the weight that it found, if it is of a low rank."""
        names = list(self.base_edits)
        before = dict(itertools.islice(self.base_edits.items(), names.index(adapter)))
        taken = self.kind.take(self.base_layer)
        try:
            with torch.no_grad():
                return self.base_edits[adapter].taken(self._edited(taken, before))
        finally:
            self.kind.put_back(self.base_layer, taken)

    def _edited(self, now: Mapping[str, Any], edits: Mapping[str, BaseEdit]) -> Tensor:
        """What edits make of the original W, which is put into the base layer in place of `now`."""
        kind, module = self.kind, self.base_layer
        if self._original is not None:
            kind.put_back(module, {**self._original, **_bias(now)})
        w = kind.read(module)[0]
        if w.is_meta and edits:
            raise ValueError(f"an adapter changes the weight of {self.layer_name!r}, which is on the meta device")
        w = w.to(wide(w.dtype))
        made: list[BaseEdit] = []
        for edit in edits.values():
            if not (edit.once and edit in made):
                w = edit(w)
            made += [edit] if edit.once else []
        return w

    def _rewrite(self, edits: Mapping[str, BaseEdit]) -> None:
        """Make the base weight what the edits make of the original; so no number is rounded, or quantised, twice."""
        kind, module = self.kind, self.base_layer
        now = kind.take(module)
        original = self._original or now
        trains = {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
        try:
            with torch.no_grad():
                w = self._edited(now, edits)
                if edits:
                    kind.write(module, w, None)
        except Exception:
            kind.put_back(module, now)
            raise
        for name, p in module._parameters.items():
            if p is not None and name in trains and p.requires_grad != trains[name]:
                p.requires_grad_(trains[name])
        self._original = {name: _on_host(value) for name, value in original.items()} if edits else None
        self.base_edits = dict(edits)
        self.changed()


def _bias(taken: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in taken.items() if name == "bias"}


def _on_host(value: Any) -> Any:
    """A dense parameter of an accelerator, in host memory: the device's is not spent on a second copy."""
    if type(value) is not nn.Parameter or value.device.type in ("cpu", "meta"):
        return value
    return nn.Parameter(value.detach().to("cpu"), requires_grad=value.requires_grad)
