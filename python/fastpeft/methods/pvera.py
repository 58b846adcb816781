"""PVeRA: VeRA whose hidden vector is drawn from a normal distribution, W + diag(b) B z with z ~ N(mu, exp(logvar)) and
(mu, logvar) = diag(d) A x, so that A [2 r, in] and d have a half for each (arXiv 2512.07703).

It draws in training and, with `sample_at_inference`, always; else z is mu, and that is what is merged.

Cost: while it draws, A has twice VeRA's rows: 1 + r (2 in + out) / (in out), 1.375 at r = 256 and 2048 x 2048; else the
half for logvar is left out, and it costs what VeRA does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, HasProjection, TargetConfig
from .math.projections import check_seed
from .method import LayerInfo, State
from .vera import Vera


@dataclass
class PveraConfig(HasProjection, HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="PVERA"):
    """r: the rank. pvera_dropout: of the input. d_initial: what d starts with. sample_at_inference: draw in evaluation
    too. generator_seed: of each layer's own generator for drawing; None takes torch's."""

    not_in_peft = ("exclude_modules",)

    r: int = 256
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    sample_at_inference: bool = False
    generator_seed: int | None = None


class Pvera(Vera, config=PveraConfig):
    prefix = "pvera_lambda_"
    tensors = ("pvera_lambda_b", "pvera_lambda_d")
    default_targets: ClassVar[dict[str, Any]] = {**Vera.default_targets, "dinov2": ["query", "value"]}
    projections = ("pvera_A", "pvera_B")
    word, parts = "pvera", 2

    def check_config(self, config: PveraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.generator_seed is not None:
            check_seed(config, "generator_seed")

    def make_state(self, config: PveraConfig, info: LayerInfo, shared: Any) -> State:
        seed = config.generator_seed
        return {
            **super().make_state(config, info, shared),
            "sample_at_inference": config.sample_at_inference,
            "pvera_generator": None if seed is None else torch.Generator().manual_seed(seed),
        }

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        return "it draws at inference (sample_at_inference=True), as no weight does" if s.sample_at_inference else None

    def rows(self, s: Any) -> int:
        return int(s.r) * (2 if s.pvera_dropout.training or s.sample_at_inference else 1)

    def hidden(self, s: Any, h: Tensor) -> Tensor:
        if h.shape[-1] == s.r:
            return h
        mean, log_variance = h.chunk(2, dim=-1)
        std = torch.exp(0.5 * log_variance)
        if s.pvera_generator is None:
            return mean + torch.randn_like(std) * std
        # A generator belongs to a device and does not move with the model, so it stays on the CPU.
        noise = torch.randn(std.shape, dtype=std.dtype, generator=s.pvera_generator)
        return mean + noise.to(std.device) * std
