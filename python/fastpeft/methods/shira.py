"""SHiRA: W + S with a sparse S, trained at r (in + out) positions that are drawn at random (arXiv 2406.13175).

FLOPs beside the frozen layer's: for few tokens 3 products of 2 * tokens * entries (`sparse.py`), 1.05 of the layer's
for r = 32 at 2048 x 2048; for many one. Saved for backward: x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import HasFanInFanOut, HasInitWeights, TargetConfig
from ..config.targets import DEFAULT_TARGETS
from ..config.types import PeftWarning
from .computed import Computed
from .math.draws import drawn_normal
from .math.sparse import dense, sparse_update
from .method import Inner, LayerInfo, Method, State


@dataclass
class ShiraConfig(HasFanInFanOut, HasInitWeights, TargetConfig, own_type="SHIRA"):
    """r: as many values are trained as a LoRA of this rank has. mask_type: "random", or anything else with `mask_fn`
    set on the configuration: a function of (base_layer, r) that gives a mask of zeros and ones in the weight's shape.
    random_seed: of the positions. init_weights: start at zero."""

    not_in_peft = ("exclude_modules", "layers_to_transform", "layers_pattern")
    mask_fn: ClassVar[Callable[..., Tensor] | None] = None

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_type != "random" and not self.inference_mode:
            text = f"mask_type={self.mask_type!r} is not known: set a function of your own as `config.mask_fn`."
            warnings.warn(text, PeftWarning, stacklevel=2)


class Shira(Method, config=ShiraConfig):
    tensors = ("shira_weight",)
    default_targets: ClassVar[dict[str, Any]] = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}
    counts = ("r",)
    examples = ({"r": 2}, {"r": 1, "random_seed": 7, "init_weights": False})

    def check_config(self, config: ShiraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.mask_type != "random" and config.mask_fn is None and not loading:
            raise ValueError(f"ShiraConfig(mask_type={config.mask_type!r}) needs a function: set `config.mask_fn`.")

    def check_layer(self, config: ShiraConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        count, most = _count(config, info), math.prod(info.shape)
        if count > most:
            raise ValueError(f"r={config.r} gives {count} values for {info.name!r}, more than the {most} of its W.")

    def make_state(self, config: ShiraConfig, info: LayerInfo, shared: Any) -> State:
        count = _count(config, info)
        values = torch.zeros(count) if config.init_weights else drawn_normal(count)
        indices = Computed((2, count), lambda: _positions(config, info, count), dtype=torch.int32)
        return {"r": config.r, "scaling": 1.0, "shira_weight": nn.Parameter(values), "shira_indices": indices}

    def check_tensors(self, info: LayerInfo, tensors: Mapping[str, Tensor]) -> None:
        check_positions(tensors["shira_indices"], info.shape)

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        return dense(s.shira_weight * s.scaling, s.shira_indices, tuple(s._layer.info.shape))

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        values = s.shira_weight if s.scaling == 1.0 else s.shira_weight * s.scaling
        return sparse_update(x, inner, values, s.shira_indices)

    def scale(self, s: Any) -> float | None:
        return 1.0


def _count(config: ShiraConfig, info: LayerInfo) -> int:
    return config.r * sum(info.shape)


def _positions(config: ShiraConfig, info: LayerInfo, count: int) -> Tensor:
    if config.mask_type == "random" and config.mask_fn is None:
        generator = torch.Generator("cpu")  # PEFT's, which has a fixed seed of its own where none is given
        if config.random_seed is not None:
            generator.manual_seed(config.random_seed)
        flat = torch.randperm(math.prod(info.shape), generator=generator)[:count].sort().values.to(info.device)
        return torch.stack([flat // info.in_features, flat % info.in_features]).int()
    assert config.mask_fn is not None
    seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
    found = torch.stack(torch.where(config.mask_fn(info.module, config.r, **seed) == 1.0)).int()
    if found.shape[1] != count:
        raise ValueError(f"the mask for {info.name!r} has {found.shape[1]} ones, but r={config.r} asks for {count}")
    return found


def check_positions(indices: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless all positions are inside a matrix of this shape. indices: as in `sparse.layouts`."""
    ends = torch.tensor(shape).view(-1, 1) if indices.dim() == 2 else torch.tensor(shape).prod()
    if indices.numel() and not bool(((indices >= 0) & (indices < ends.to(indices.device))).all()):
        raise ValueError(f"a position lies outside the weight's shape {list(shape)}")
