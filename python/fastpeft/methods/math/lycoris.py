"""LoHa and LoKr in common: fields, scaling alpha / r, dropout of whole modules and of output channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...config.base import TargetConfig
from ..method import Inner, LayerInfo, State
from .draws import kaiming_
from .factored import FactoredMethod
from .made_weight import with_weight


@dataclass
class LycorisConfig(TargetConfig):
    """r, alpha: rank and numerator of the scaling alpha / r. rank_pattern, alpha_pattern: values for layers by pattern.
    rank_dropout: share of the output channels that the update skips in a training step. module_dropout: probability
    that it skips a layer. use_effective_conv2d: Tucker decomposition in convolutions with a kernel above 1."""

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int] | None = field(default_factory=dict)


class Lycoris(FactoredMethod):
    """Subclasses give `delta_weight` and, where that costs less, `added`."""

    kinds = frozenset({"linear", "conv1d", "conv2d"})
    counts = ("r",)
    patterns: ClassVar[dict[str, str]] = {"r": "rank_pattern", "alpha": "alpha_pattern"}

    def values(self, config: LycorisConfig) -> State:
        own = {name: getattr(config, name) for name in ("r", "alpha", "rank_dropout", "module_dropout")}
        return {**own, "scaling": config.alpha / config.r}

    def scale(self, s: Any) -> float | None:
        return float(s.alpha / s.r)

    def added(self, s: Any, x: Tensor, inner: Inner) -> Tensor:
        """The update's part of the output. Here through a dense weight, which is made again in the backward."""

        def run(x: Tensor) -> Tensor:
            return inner.apply(x, self.delta_weight(s, s, None).to(x.dtype).reshape(inner.info.shape))

        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        """A convolution, where nothing is dropped: one with another weight, unless `added` costs less."""
        frozen = inner.frozen() if inner.info.kind != "linear" and self._fusible(s) else None
        if frozen is None or self.is_cheap(s, inner.info):
            return super().forward(s, shared, x, inner)
        return with_weight(inner, x, frozen, lambda w: w + self.delta_weight(s, s, None).view(w.shape))

    def splits(self, s: Any, info: LayerInfo) -> bool:
        return info.kind == "linear" or self.is_cheap(s, info)

    def is_cheap(self, s: Any, info: LayerInfo) -> bool:
        """True if `added` costs less than half as much again as the layer, which one with another weight costs."""
        return False

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        if s.training and s.module_dropout > 0.0 and not torch.rand(1) > s.module_dropout:
            return y
        added = self.added(s, x, inner)
        if s.training and s.rank_dropout > 0.0:
            kept = (torch.rand(s.out_features) > s.rank_dropout).float()
            if s.get("rank_dropout_scale", True):
                kept = kept / kept.mean().clamp(min=1 / len(kept))  # none kept: the update is zero, not NaN
            added = added * kept.to(added).view(-1, *[1] * (len(inner.info.shape) - 2))
        return y + added

    def _fusible(self, s: Any) -> bool:
        return not (s.training and (s.rank_dropout or s.module_dropout))


def effective(config: LycorisConfig, info: LayerInfo) -> bool:
    """True if the Tucker decomposition is used: not for kernels of 1, where it is none."""
    return config.use_effective_conv2d and math.prod(info.shape[2:]) != 1


def uniform(*shape: int) -> nn.Parameter:
    """As PEFT starts its factors, in the order of the calls."""
    return nn.Parameter(kaiming_(torch.empty(shape)))
