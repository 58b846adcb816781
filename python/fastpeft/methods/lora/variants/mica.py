"""MiCA: B, frozen, holds the left singular vectors of W's smallest singular values; A is zero (arXiv 2604.01694)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch

from ...method import LayerInfo, State
from ..lora import Lora
from . import variant


@variant("mica")
class Mica(Lora):
    kinds = frozenset({"linear", "embedding"})
    inits = ("mica",)
    examples: ClassVar[Any] = ({"r": 4, "lora_alpha": 3, "init_lora_weights": "mica"},)

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        super().check_layer(config, info)
        most = min(info.out_features, info.in_features)
        if config.r > most:
            raise ValueError(f"MiCA requires `r` <= min(in, out) = {most} for {info.name!r}, got r={config.r}.")

    def trains(self, s: Any, name: str) -> bool:
        return name in ("lora_A", "lora_embedding_A")

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        own = copy.copy(config)
        own.init_lora_weights = False
        state = super().make_state(own, info, shared)
        whole = "lora_embedding_A" in state  # then they are no modules
        a, b = (state[f"lora_embedding_{n}"] if whole else state[f"lora_{n}"].weight for n in "AB")
        if not b.is_meta:
            w = info.weight()
            if w.is_meta:
                raise ValueError(f"init_lora_weights='mica' needs the weight of {info.name!r}, which is on 'meta'.")
            with torch.no_grad():
                a.zero_()
                b.copy_(torch.linalg.svd(w, full_matrices=False)[0][:, -config.r :])
        return state
