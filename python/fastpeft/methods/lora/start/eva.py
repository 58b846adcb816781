"""EVA: A starts as the principal components of the layer's inputs, which `initialize_lora_eva_weights` finds
(arXiv 2410.07170)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ....config.seen_as_peft import SeenAsPeft
from ...method import LayerInfo, State
from . import Start


@dataclass
class EvaConfig(SeenAsPeft):
    """rho: a layer's rank is at most rho times its configured one; 1 leaves ranks as they are. tau: a component has
    converged when it and the one of the step before have this cosine similarity. use_label_mask, label_mask_value:
    pass over tokens with this label. whiten: scale components by their singular values. adjust_scaling_factors: keep a
    layer's scaling where its rank changes."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1.0:
            raise ValueError(f"`rho` must be >= 1.0, got {self.rho!r}")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"`tau` must be between 0.0 and 1.0. Got {self.tau!r}")


class Eva(Start):
    name = "eva"
    shown = "EVA"
    field = "eva_config"
    options = EvaConfig
    edits_base = takes_base = False
    rank_parts = 0

    def initialise(self, config: Any, info: LayerInfo, scaling: float, a: Tensor, b: Tensor) -> State:
        if not b.is_meta:
            nn.init.zeros_(b)
        return {}
