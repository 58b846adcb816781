"""RoAd: the output is rotated and scaled in pairs, W -> R W and b -> R b (arXiv 2409.00119).

R is [[a cos t, -a' sin t'], [a' sin t', a cos t]] for each pair: elementwise on activations, no FLOPs of the order of
the layer's; the backward keeps the wrapped layer's output once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_kernels import pair_rotate

from ..config.base import HasInitWeights, TargetConfig
from .math.draws import normal_
from .method import Inner, LayerInfo, Method, State

SIZES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}  # angles per output, as a fraction


@dataclass
class RoadConfig(HasInitWeights, TargetConfig, own_type="ROAD"):
    """variant: "road_1" has an angle and a scale for each pair, "road_2" for each element, "road_4" two for each.
    group_size: element i of a group is paired with element i + group_size / 2; it must divide the output size."""

    not_in_peft = ("exclude_modules", "layers_to_transform", "layers_pattern")
    choices: ClassVar[Any] = {"variant": tuple(SIZES)}

    variant: str = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(
                f"The group_size must be divisible by 2 when using RoadLayer, but got {self.group_size}. "
                "Choose a positive multiple of 2."
            )


class Road(Method, config=RoadConfig):
    tensors = ("road_theta", "road_alpha")
    divisor_error = "The {size} of the base layer must be divisible by {field} ({part}) when using RoadLayer."
    divisors: ClassVar[dict[str, tuple[str, ...]]] = {"group_size": ("out_features",)}
    examples = (
        {"group_size": 4}, {"variant": "road_4", "group_size": 10},
        {"variant": "road_2", "group_size": 2, "init_weights": False},
    )  # fmt: skip

    def make_state(self, config: RoadConfig, info: LayerInfo, shared: Any) -> State:
        times, per = SIZES[config.variant]
        size = info.out_features * times // per
        theta, alpha = torch.zeros(size), torch.ones(size)
        if not config.init_weights:
            normal_(theta, std=0.5)
            normal_(alpha, mean=1.0, std=0.5)
        return {
            "road_theta": nn.Parameter(theta), "road_alpha": nn.Parameter(alpha),
            "variant": config.variant, "group_size": config.group_size,
        }  # fmt: skip

    @staticmethod
    def _columns(s: Any) -> tuple[Tensor, Tensor]:
        theta, alpha = s.road_theta, s.road_alpha
        if s.variant == "road_1":
            half = s.group_size // 2
            theta, alpha = (v.view(-1, 1, half).expand(-1, 2, half).flatten() for v in (theta, alpha))
        if s.variant != "road_4":
            return alpha * theta.cos(), alpha * theta.sin()
        (t1, t2), (a1, a2) = (v.view(-1, 2, s.group_size).unbind(1) for v in (theta, alpha))
        return (a1 * t1.cos()).flatten(), (a2 * t2.sin()).flatten()

    def _rotate(self, s: Any, y: Tensor, dtype: torch.dtype) -> Tensor:
        first, second = (v.to(dtype) for v in self._columns(s))
        return pair_rotate(y.to(dtype), first, second, s.group_size // 2)

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._rotate(s, w.T, w.dtype).T, None if b is None else self._rotate(s, b, w.dtype)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        return self._rotate(s, y, torch.promote_types(y.dtype, s.road_theta.dtype))
