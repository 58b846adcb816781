"""Lily: y + s x A^T B, with B a mixture of num_B matrices by a router (arXiv 2407.09946).

The router's weights are averaged over the batch's tokens, so no merged form exists. A is shared by stride_A layers in a
row and the B by all layers of the same target and shape. FLOPs beside the frozen layer's: those of a LoRA of rank r,
3 * 2 * tokens * r * (in + out), and num_B * r * out for the mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import HasInitWeights, TargetConfig
from .math.draws import kaiming_
from .method import Inner, LayerInfo, Method, State


@dataclass
class LilyConfig(HasInitWeights, TargetConfig, own_type="LILY"):
    """r: rank. stride_A: so many consecutive layers share one A. num_B: matrices B of a target, at least two.
    scaling: factor of the update. init_weights: B starts at zero, or random (False)."""

    least: ClassVar[Any] = {"stride_A": 1, "num_B": 2}  # with one B the router has nothing to choose

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0


class Lily(Method, config=LilyConfig):
    tensors = ("lily_A", "lily_B", "lily_router")
    counts = ("r", "num_B")
    examples = ({"r": 4}, {"r": 3, "num_B": 3, "scaling": 0.5, "init_weights": False})
    mergeable = False

    def make_state(self, config: LilyConfig, info: LayerInfo, shared: Any) -> State:
        a = nn.Linear(info.in_features, config.r, bias=False)
        b = nn.Linear(info.out_features, config.num_B * config.r, bias=False)
        router = nn.Linear(config.r, config.num_B, bias=False)
        kaiming_(a.weight)
        kaiming_(router.weight)
        nn.init.zeros_(b.weight) if config.init_weights else kaiming_(b.weight)
        return {
            "lily_A": a, "lily_B": b, "lily_router": router, "r": config.r, "scaling": config.scaling,
            "stride_A": config.stride_A, "num_B": config.num_B,
        }  # fmt: skip

    def tie(self, config: LilyConfig, adapter: str, layers: Mapping[str, Any], leaders: Mapping[str, str]) -> None:
        groups: dict[Any, list[Any]] = {}
        targets = [] if isinstance(config.target_modules, str) else config.target_modules or ()
        for name, layer in layers.items():
            end = max((t for t in targets if name.endswith(t)), key=len, default="")
            groups.setdefault((end, layer.info.shape), []).append(layer)
        for members in groups.values():
            for i, layer in enumerate(members):
                layer.lily_B[adapter] = members[0].lily_B[adapter]
                layer.lily_A[adapter] = members[i - i % config.stride_A].lily_A[adapter]

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        hidden = s.lily_A(x.to(s.lily_A.weight.dtype))
        chosen = torch.softmax(s.lily_router(hidden), dim=-1).reshape(-1, s.num_B).mean(dim=0)
        b = torch.einsum("e,eio->io", chosen, s.lily_B.weight.unflatten(0, (s.num_B, -1)))
        return y + torch.matmul(hidden, b) * s.scaling  # type: ignore[no-any-return]
