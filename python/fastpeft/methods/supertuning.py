"""Super-Tuning: W + S, S sparse at the largest (or smallest) entries of W, and with `r` a LoRA too (arXiv 2607.09287).

FLOPs beside the frozen layer's: for few tokens 3 products of 2 * tokens * entries (`sparse.py`), 1.015 of the layer's
at the default sparsity of 0.99, for many one; with r those of a LoRA. Saved for backward: x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.base import HasInitWeights, TargetConfig, check_probabilities, check_ranks
from ..config.types import PeftWarning
from .computed import Computed
from .math.draws import drawn_normal, kaiming_
from .math.factored import dropout
from .math.sparse import dense, sparse_update
from .method import Inner, LayerInfo, Method, State
from .shira import check_positions


@dataclass
class SupertuningConfig(HasInitWeights, TargetConfig, own_type="SUPERTUNING"):
    """sparsity: the share of the weight that is not trained. select_top: train its largest entries, not its smallest.
    r, lora_alpha (2 r), lora_dropout: of a LoRA beside it. save_precomputed_indices: write the positions into files;
    otherwise they are found again in the base weight."""

    not_in_peft = ("exclude_modules", "layers_to_transform", "layers_pattern")

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0.0, 1.0), got {self.sparsity}")
        check_probabilities(self)
        if self.r is not None:
            if type(self.r) is not int or self.r < 1:
                raise ValueError(f"r must be a positive integer, got {self.r!r}.")
            check_ranks(self.r)
            self.lora_alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        elif self.lora_alpha is not None:
            raise ValueError("lora_alpha is set but r is None: a LoRA needs an explicit r.")
        if not self.save_precomputed_indices:
            warnings.warn("save_precomputed_indices=False: the positions will be found again in the base weight when "
                          "the adapter is loaded, so that needs the very same base weight.", PeftWarning,
                          stacklevel=2)  # fmt: skip


class Supertuning(Method, config=SupertuningConfig):
    tensors = ("supertuning_values", "supertuning_lora_A", "supertuning_lora_B")
    examples = ({"sparsity": 0.9}, {"sparsity": 0.8, "select_top": False, "r": 3, "lora_dropout": 0.1})

    def check_layer(self, config: SupertuningConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if _count(config, info) < 1:
            entries = f"no trainable entries of {info.name!r}, whose weight has {math.prod(info.shape)}"
            raise ValueError(f"sparsity={config.sparsity} leaves {entries}. Lower the sparsity.")

    def make_state(self, config: SupertuningConfig, info: LayerInfo, shared: Any) -> State:
        count, saved = _count(config, info), config.save_precomputed_indices

        def positions() -> Tensor:
            return torch.topk(info.base.read()[0].abs().flatten(), count, largest=config.select_top)[1].int()

        state: State = {
            "supertuning_values": nn.Parameter(torch.zeros(count) if config.init_weights else drawn_normal(count)),
            "supertuning_indices": Computed((count,), positions, saved, torch.int32),
            "supertuning_rank": config.r or 0, "supertuning_lora_alpha": float(config.lora_alpha or 0.0),
        }  # fmt: skip
        if config.r is None:
            return state
        a = nn.Linear(info.in_features, config.r, bias=False, dtype=torch.float32)
        b = nn.Linear(config.r, info.out_features, bias=False, dtype=torch.float32)
        kaiming_(a.weight)
        nn.init.zeros_(b.weight) if config.init_weights else kaiming_(b.weight)
        drop = dropout(config.lora_dropout)
        return {**state, "supertuning_lora_A": a, "supertuning_lora_B": b, "supertuning_lora_dropout": drop}

    def check_tensors(self, info: LayerInfo, tensors: Mapping[str, Tensor]) -> None:
        if "supertuning_indices" in tensors:
            check_positions(tensors["supertuning_indices"], info.shape)

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        delta = dense(s.supertuning_values, s.supertuning_indices, tuple(s._layer.info.shape))
        if s.supertuning_rank:
            lora = s.supertuning_lora_B.weight @ s.supertuning_lora_A.weight
            delta = delta + lora * (s.supertuning_lora_alpha / s.supertuning_rank)
        return delta

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        y = sparse_update(x, inner, s.supertuning_values, s.supertuning_indices)
        if s.supertuning_rank:
            low = s.supertuning_lora_A(s.supertuning_lora_dropout(x).to(s.supertuning_lora_A.weight.dtype))
            y = (y + s.supertuning_lora_B(low) * (s.supertuning_lora_alpha / s.supertuning_rank)).to(y.dtype)
        return y


def _count(config: SupertuningConfig, info: LayerInfo) -> int:
    return int(math.prod(info.shape) * (1 - config.sparsity))
