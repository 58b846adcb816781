"""PEANuT: W + s (f(W^T) B^T)^T, with f a small network that reads the base weight's columns (arXiv 2410.01870).

f(W^T) = act(W^T A^T) and, for each of `depth`, one more layer on the way in and one on the way out with residuals.
FLOPs beside the frozen layer's: reading W, 2 * in * out * r, and again for A's gradient; the update is never formed, as
(x f(W^T)) B^T costs 3 * 2 * tokens * r * (in + out). 1.1 of the frozen layer's for r = 32 at 2048 x 2048, 512 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasInitWeights, TargetConfig, check, check_ranks
from .math.draws import kaiming_
from .method import Inner, LayerInfo, Method, State

MAX_DEPTH = 1000  # each layer of it is two modules in every adapted layer


@dataclass
class PeanutConfig(HasInitWeights, TargetConfig, own_type="PEANUT"):
    """r: hidden size. depth: hidden layers on each side. act_fn: a key of transformers' ACT2FN. scaling: factor of the
    update. init_weights: B starts at zero, or random (False)."""

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r)
        depths = f"an integer from 0 to {MAX_DEPTH}"
        check(self, "depth", type(self.depth) is int and 0 <= self.depth <= MAX_DEPTH, depths)
        _activation(self.act_fn)


class Peanut(Method, config=PeanutConfig):
    tensors = ("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders")
    counts = ("r",)
    examples = ({"r": 4}, {"r": 3, "depth": 2, "act_fn": "tanh", "scaling": 0.5, "init_weights": False})
    needs_base_weight = True

    def make_state(self, config: PeanutConfig, info: LayerInfo, shared: Any) -> State:
        r = config.r
        a = nn.Linear(info.out_features, r, bias=False)
        layers = [nn.Linear(r, r, bias=False) for _ in range(2 * config.depth)]
        encoders, decoders = nn.ModuleList(layers[: config.depth]), nn.ModuleList(layers[config.depth :])
        b = nn.Linear(r, info.out_features, bias=False)
        for module in (a, *layers):
            kaiming_(module.weight)
        nn.init.zeros_(b.weight) if config.init_weights else kaiming_(b.weight)
        return {
            "peanut_A": a, "peanut_B": b, "peanut_encoders": encoders, "peanut_decoders": decoders, "r": r,
            "depth": config.depth, "res_num": config.depth, "scaling": config.scaling, "act_fn": config.act_fn,
        }  # fmt: skip

    def _read(self, s: Any, w: Tensor) -> Tensor:
        """f(W^T) [in_features, r]."""
        act = _activation(s.act_fn)
        seen: list[Tensor] = [act(F.linear(w.t(), s.peanut_A.weight))]
        for encoder in s.peanut_encoders:
            seen.append(act(F.linear(seen[-1], encoder.weight)))
        h = seen.pop()
        for decoder in s.peanut_decoders:
            h = act(F.linear(h, decoder.weight)) + seen.pop()
        return h

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        a, b = self.factors(s, shared, w)
        return b @ a

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        assert w is not None
        b = s.peanut_B.weight
        return self._read(s, w.to(b.dtype)).t(), b * s.scaling

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        a, b = self.factors(s, shared, inner.weight()[0])
        return y + F.linear(F.linear(x.to(b.dtype), a), b)


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    if not isinstance(name, str) or name not in ACT2FN:
        raise ValueError(f"Unsupported `act_fn`: {name}. Must be one of {sorted(ACT2FN)}.")
    return ACT2FN[name]
