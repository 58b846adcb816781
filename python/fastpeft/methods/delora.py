"""DeLoRA: normalised rank-one updates, bounded by lambda (arXiv 2503.18225).

W + B diag(lambda / (r |a_i| |b_i|)) A diag(n), with n the norms of W's columns when the adapter was made. Everything
but B and A goes into B and A, so that it costs what LoRA costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import HasBias, HasInitWeights, TargetConfig
from .math.draws import kaiming_
from .math.factored import FactoredMethod, dropout
from .method import LayerInfo, State

LEAST_NORM = 1e-4


@dataclass
class DeloraConfig(HasBias, HasInitWeights, TargetConfig, own_type="DELORA"):
    """r: rank. delora_lambda: bound of the update's norm, where its training starts. module_dropout: of the adapter's
    input. rank_pattern, lambda_pattern: values for layers by pattern. init_weights: False starts with a random B."""

    least: ClassVar[Any] = {"r": 1}

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)


class Delora(FactoredMethod, config=DeloraConfig):
    tensors = ("delora_A", "delora_B", "delora_lambda")
    dropout = "delora_dropout"
    patterns: ClassVar[dict[str, str]] = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}
    counts = ("r",)
    examples = ({"r": 3}, {"r": 2, "delora_lambda": 4, "init_weights": False})

    def make_state(self, config: DeloraConfig, info: LayerInfo, shared: Any) -> State:
        a, b = kaiming_(torch.empty(config.r, info.in_features)), torch.zeros(info.out_features, config.r)
        if config.init_weights is not True:
            kaiming_(b)
        bound = torch.full((1,), float(config.delora_lambda))
        w = a if a.is_meta else info.base.read()[0].detach()
        norm = torch.ones(info.in_features) if w.is_meta else w.norm(dim=0)
        state: State = {"delora_A": nn.Parameter(a), "delora_B": nn.Parameter(b), "delora_lambda": nn.Parameter(bound)}
        return {**state, "r": config.r, "delora_dropout": dropout(config.module_dropout), "delora_w_norm": norm}

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b = s.delora_A, s.delora_B
        norms = a.norm(dim=1).clamp(min=LEAST_NORM) * b.norm(dim=0).clamp(min=LEAST_NORM)
        return a * s.delora_w_norm, b * (s.delora_lambda / s.r / norms)
