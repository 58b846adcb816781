"""Uni-LoRA: a LoRA whose A and B of all layers are one short trained vector, theta_d, spread out by a fixed random
assignment: A[i, j] = theta_d[index[i, j]] / sqrt(how often that index occurs) (arXiv 2506.00799).

Cost: that of LoRA, 1 + 3 r (in + out) / (2 in out): gathering A and B, and the gradient of theta_d, are no products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig, check
from ..config.limits import MAX_RANK
from .computed import Computed
from .math.factored import FactoredMethod, dropout
from .math.projections import check_seed
from .method import LayerInfo, State, check_indices

# A file without indices names a rank only, and 12 bytes are allocated for each of its r (in + out) elements.
MAX_LOADED_RANK = 1024


@dataclass
class UniLoraConfig(HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="UNILORA"):
    """r: the rank. proj_seed: of the assignment. theta_d_length: of the vector. unilora_dropout: of the input.
    init_theta_d_bound: theta_d starts uniform within this. save_indices: files hold the assignment too."""

    not_in_peft = ("exclude_modules",)

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    save_indices: bool = False


class UniLora(FactoredMethod, config=UniLoraConfig):
    tensors = ("unilora_theta_d",)
    dropout = "unilora_dropout"
    counts = ("r",)
    examples = ({"r": 2, "theta_d_length": 12}, {"r": 3, "theta_d_length": 7, "save_indices": True})

    def check_config(self, config: UniLoraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        check_seed(config, "proj_seed")
        length = config.theta_d_length
        check(config, "theta_d_length", type(length) is int and length >= 1, "a positive integer")
        check(config, "proj_seed", config.proj_seed >= 0, "at least 0")
        check(config, "init_theta_d_bound", config.init_theta_d_bound > 0, "positive")
        if loading and not config.save_indices and config.r > MAX_LOADED_RANK:
            raise ValueError(f"`r`={config.r} in a file without indices; at most {MAX_LOADED_RANK} is loaded")

    def make_shared(self, config: UniLoraConfig, layers: Sequence[LayerInfo]) -> State:
        assignment = _Assignment(config, layers)
        if config.theta_d_length > max(assignment.count, MAX_RANK):  # some more, in a small model, do no harm
            most = f"the {assignment.count} elements that it is for"
            raise ValueError(f"`theta_d_length`={config.theta_d_length} is more than {most}")
        theta = torch.empty(config.theta_d_length)
        if not theta.is_meta:
            bound = config.init_theta_d_bound
            theta.uniform_(-bound, bound) if config.init_weights else theta.normal_()
        return {"unilora_theta_d": nn.Parameter(theta), "assignment": assignment}

    def make_state(self, config: UniLoraConfig, info: LayerInfo, shared: Any) -> State:
        state: State = {"r": config.r, "unilora_dropout": dropout(config.unilora_dropout)}
        for which, shape in _shapes(config, info).items():
            for part, dtype in (("indices", torch.long), ("scales", torch.float32)):
                make = functools.partial(shared.assignment, info.name, which, part)
                state[f"unilora_{part}_{which}"] = Computed(shape, make, config.save_indices, dtype)
        return state

    def unpack(self, config: UniLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key, value in tensors.items():
            if "unilora_indices_" in key:
                check_indices(key, value, "theta_d_length", config.theta_d_length)
        return tensors

    def ignores(self, config: UniLoraConfig, key: str) -> bool:
        return not config.save_indices and key.rpartition(".")[2].startswith(("unilora_indices_", "unilora_scales_"))

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        theta = shared.unilora_theta_d.to(s.unilora_indices_A.device)
        a = theta[s.unilora_indices_A] * s.unilora_scales_A.to(theta.dtype)
        return a, theta[s.unilora_indices_B] * s.unilora_scales_B.to(theta.dtype)


def _shapes(config: UniLoraConfig, info: LayerInfo) -> dict[str, tuple[int, int]]:
    return {"A": (config.r, info.in_features), "B": (info.out_features, config.r)}


class _Assignment:
    """Which element of theta_d each element of each layer's A and B is, drawn for all of them together.

    Every index occurs equally often, or once more; then all are shuffled (as PEFT does, with the same numbers).
    """

    def __init__(self, config: UniLoraConfig, layers: Sequence[LayerInfo]) -> None:
        self.config = config
        self.shapes = {(i.name, which): shape for i in layers for which, shape in _shapes(config, i).items()}
        self.count = sum(map(math.prod, self.shapes.values()))

    @functools.cached_property
    def drawn(self) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
        """The indices of each A and B, flat, and a scale for each element of theta_d."""
        length = self.config.theta_d_length
        rng = np.random.default_rng(self.config.proj_seed)
        each, left = divmod(self.count, length)
        data = np.repeat(np.arange(length), each)
        if left:
            data = np.concatenate([data, rng.choice(length, size=left, replace=False)])
        rng.shuffle(data)
        indices = torch.as_tensor(data, dtype=torch.long)
        counts = torch.bincount(indices, minlength=length)
        parts = torch.split(indices, [math.prod(shape) for shape in self.shapes.values()])
        return dict(zip(self.shapes, parts, strict=True)), counts.clamp(min=1).float().rsqrt()

    def __call__(self, name: str, which: str, part: str) -> Tensor:
        indices, scales = self.drawn
        mine = indices[name, which].view(self.shapes[name, which])
        return mine.clone() if part == "indices" else scales[mine]
