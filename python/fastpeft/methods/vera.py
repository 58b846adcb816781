"""VeRA: W + diag(b) B diag(d) A, with A [r, in] and B [out, r] random, frozen and shared by all layers, and the vectors
b and d trained (arXiv 2310.11454).

Cost: A and B, which have no gradients, are multiplied with once each in both directions: 1 + r (in + out) / (in out) of
the frozen layer, 1.25 at r = 256 and 2048 x 2048. Saved are B(d A x) for the gradient of b, and A x for that of d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, HasProjection, TargetConfig
from ..config.targets import DEFAULT_TARGETS
from ..weights.base import wide
from .math.draws import drawn_normal
from .math.factored import dropout
from .math.projections import ProjectedMethod
from .method import Inner, LayerInfo, State


@dataclass
class VeraConfig(HasProjection, HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="VERA"):
    """r: the rank. vera_dropout: of the input. d_initial: what d starts with."""

    not_in_peft = ("exclude_modules",)

    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1


class Vera(ProjectedMethod, config=VeraConfig):
    prefix = "vera_lambda_"
    tensors = ("vera_lambda_b", "vera_lambda_d")
    default_targets: ClassVar[dict[str, Any]] = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}
    projections = ("vera_A", "vera_B")
    counts: ClassVar[tuple[str, ...]] = ("r",)
    examples = ({"r": 5}, {"r": 30, "save_projection": False, "init_weights": False})

    word: ClassVar[str] = "vera"  # what the names of tensors begin with
    parts: ClassVar[int] = 1  # how many vectors of r numbers d and A give

    def make_shared(self, config: Any, layers: Sequence[LayerInfo]) -> State:
        width, height = max(i.in_features for i in layers), max(i.out_features for i in layers)
        shapes = (self.parts * config.r, width), (height, config.r)

        def draw(generator: torch.Generator) -> list[Tensor]:
            return [nn.init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in shapes]

        return self.drawn(config, shapes, draw)

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        b, d = torch.ones(info.out_features), drawn_normal(self.parts * config.r)
        if config.init_weights:
            b.zero_()
            d.fill_(config.d_initial)
        drop, (of_b, of_d) = f"{self.word}_dropout", self.tensors
        return {"r": config.r, drop: dropout(getattr(config, drop)), of_b: nn.Parameter(b), of_d: nn.Parameter(d)}

    def tensors_of(self, s: Any, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """b, d, A and B for this layer, of A and d the first rows."""
        b, d, a, back = (getattr(s, name) for name in (*self.tensors, *self.projections))
        found = b, d[:rows], a[:rows, : s.in_features], back[: s.out_features]
        return tuple(t.to(d.device, dtype or d.dtype) for t in found)

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        b, d, a, back = self.tensors_of(s, s.r, wide(getattr(s, self.tensors[1]).dtype))
        return (b[:, None] * back) @ (d[:, None] * a)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        b, d, a, back = self.tensors_of(s, self.rows(s))
        h = d * F.linear(getattr(s, f"{self.word}_dropout")(x.to(d.dtype)), a)
        return torch.addcmul(y, b, F.linear(self.hidden(s, h), back))

    def rows(self, s: Any) -> int:
        """The number of rows of A that this call needs."""
        return int(s.r)

    def hidden(self, s: Any, h: Tensor) -> Tensor:
        """The vector that B is applied to."""
        return h
