"""Starts of LoRA that read the base weight, or gradients or inputs of its layer: a class and a file each.

A new file is found by itself; no list has them. The base weight gives up for the adapter what the start takes
(`base_edit.py`), so that the model starts as what it was.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....config.types import PeftWarning
from ...base_edit import EDIT, BaseEdit, LowRankEdit
from ...method import LayerInfo, State

MAX_ITERATIONS = 1000
Edit = BaseEdit | None


class Start:
    """A value of `init_lora_weights`.

    name: the value; shown: its name in words. field, options: the field of LoraConfig with the start's options, and
    their class. takes_base: the adapter takes over a part of the base weight. edits_base: the base weight changes.
    used: attributes of the module that are of no use once the adapter is made. rank_parts: a rank of at most 1 / so
    much of the smaller side; 0: any. others_plain: convolutions start as plain LoRAs, as embeddings do with any start.
    """

    name: ClassVar[str]
    shown: ClassVar[str]
    field: ClassVar[str] = ""
    options: ClassVar[type[Any] | None] = None
    edits_base: ClassVar[bool] = True
    takes_base: ClassVar[bool] = True
    used: ClassVar[tuple[str, ...]] = ()
    rank_parts: ClassVar[int] = 1
    others_plain: ClassVar[bool] = False

    def accepts(self, value: Any) -> bool:
        return bool(value == self.name)

    def complete(self, config: Any, chosen: bool) -> None:
        """Check and fill in the start's options when a LoraConfig is made, which may have chosen another."""
        if self.options is None:
            return
        value = getattr(config, self.field)
        if not isinstance(value, self.options | None):
            raise TypeError(f"`{self.field}` must be a `{self.options.__name__}`, a dict, or None, got {value!r}.")
        if chosen and value is None:
            what = f"`init_lora_weights` is '{self.name}' but `{self.field}` is not specified."
            text = f"{what} Using default {self.name.upper()} config."
            warnings.warn(text, PeftWarning, stacklevel=5)
            setattr(config, self.field, self.options())
        elif not chosen and value is not None:
            self.ignored()

    def ignored(self) -> None:
        text = f"`{self.field}` specified but will be ignored when `init_lora_weights` is not '{self.name}'."
        warnings.warn(text, PeftWarning, stacklevel=6)

    def check_config(self, config: Any) -> None:
        """Raise ValueError for options that make no sense."""

    def for_edited(self, info: LayerInfo) -> bool:
        """True where an adapter of this start, without what it starts from, is for a base that one has edited."""
        return False

    @torch.no_grad()
    def initialise(self, config: Any, info: LayerInfo, scaling: float, a: Tensor, b: Tensor) -> State:
        """Set a new linear layer's A and B, and return the edit of the base as an entry of its state.

        A and B on the meta device are for a file to fill; the base is edited all the same, as when they were made.
        """
        w = info.weight()
        if w.is_meta:
            where = f"the weight of {info.name!r}, which is on the meta device"
            raise ValueError(f"init_lora_weights={config.init_lora_weights!r} needs {where}.")
        made_a, made_b, edit = self.factors(config, info, scaling, w)
        if edit is None:
            # Rounded to how they are kept: what they lose so, the base keeps.
            made_a, made_b = made_a.to(info.dtype).to(w), made_b.to(info.dtype).to(w)
            edit = LowRankEdit(scaling * made_b, made_a.clone(), self.used)
        if not a.is_meta:
            a.copy_(made_a)
            b.copy_(made_b)
        return {EDIT: edit}

    def factors(self, config: Any, info: LayerInfo, scaling: float, w: Tensor) -> tuple[Tensor, Tensor, Edit]:
        """A and B, and the edit of the base unless it is that scaling * B A is taken from W."""
        raise NotImplementedError


@functools.cache
def starts() -> tuple[Start, ...]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(cls() for cls in Start.__subclasses__())


def start_of(value: Any) -> Start | None:
    """The start that a value of `init_lora_weights` means; None for LoRA's own."""
    return next((start for start in starts() if start.accepts(value)), None)


def complete(config: Any) -> None:
    """Fill in and check the options of starts when a LoraConfig is made."""
    chosen = start_of(config.init_lora_weights)
    for start in starts():
        start.complete(config, start is chosen)
    patterns = config.rank_pattern or config.alpha_pattern
    if config.use_rslora and patterns and chosen is not None and chosen.takes_base:
        warnings.warn("Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of "
                      f"{chosen.name} to a plain LoRA of the original base do not go together: "
                      "`save_pretrained(path_initial_model_for_weight_conversion=...)` will be refused.",
                      PeftWarning, stacklevel=4)  # fmt: skip


def warn_beside(configs: Sequence[Any]) -> None:
    """Warn where one of several adapters of a model has a start that takes a part of the base weight."""
    found = (start_of(getattr(config, "init_lora_weights", None)) for config in configs if len(configs) > 1)
    if taking := next((start for start in found if start is not None and start.takes_base), None):
        warnings.warn(
            f"{taking.shown} changes the base weights of the model and should thus not be used with other adapters. "
            "Save it as a plain LoRA (path_initial_model_for_weight_conversion) to use several at once.",
            PeftWarning, stacklevel=4,
        )  # fmt: skip


def starts_plain(start: Start, info: LayerInfo) -> bool:
    """True for a layer that the adapter goes into and the start is not for."""
    return info.kind == "embedding" or (start.others_plain and info.kind.startswith("conv"))


def check_layer(config: Any, info: LayerInfo) -> None:
    """Raise ValueError where a start makes no sense. Embeddings start as plain LoRAs, as in PEFT's files."""
    init, what = config.init_lora_weights, f"{info.name!r}, a {type(info.module).__name__}"
    start = start_of(init)
    if start is None:
        return
    if starts_plain(start, info):
        text = f"init_lora_weights={init!r} is for linear layers: {what}, starts as a plain LoRA."
        warnings.warn(text, PeftWarning, stacklevel=2)
        return
    if info.kind != "linear" or info.transient:
        raise ValueError(f"init_lora_weights={init!r} is for linear layers, it cannot start {what}.")
    most = min(info.out_features, info.in_features) // start.rank_parts if start.rank_parts else config.r
    if config.r > most:
        raise ValueError(f"init_lora_weights={init!r} needs a rank of at most {most} for {what}, got r={config.r}.")
