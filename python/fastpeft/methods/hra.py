"""HRA: the input is rotated by r Householder reflections, W -> W H_1 ... H_r (arXiv 2405.17484).

In compact WY form H_1 ... H_r = I - U K U^T, with unit columns U [d, r] and K^-1 = I / 2 + (U^T U above the diagonal):
T tokens cost 2 T d r multiplications against T d^2 of the layer, and the backward keeps [T, r]. With Gram-Schmidt
(apply_GS) the columns are orthonormal and K = 2 I.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import householder_rotate

from ..config import HasBias, HasInitWeights, PeftType, PeftWarning, TargetConfig
from ..method import LayerInfo, State, register
from ..rotation import RotatesInput


@dataclass
class HRAConfig(HasBias, HasInitWeights, TargetConfig):
    """r: number of reflections; an even one starts as the identity, of pairs that undo each other. apply_GS: make the
    reflections' vectors orthogonal first."""

    own_type = PeftType.HRA

    r: int = 8
    apply_GS: bool = False


@register
class HRA(RotatesInput):
    prefix = "hra_"
    config_class = HRAConfig
    tensors = ("hra_u",)
    others = ("hra_r", "hra_apply_GS")
    counts = ("r",)
    examples = ({"r": 4}, {"r": 3, "apply_GS": True}, {"r": 8, "init_weights": False}, {"r": 1})

    def make_state(self, config: HRAConfig, info: LayerInfo, shared: Any) -> State:
        pairs = config.init_weights and config.r % 2 == 0
        if config.init_weights and not pairs:
            warnings.warn("The symmetric initialization can NOT be performed when r is odd!", PeftWarning, stacklevel=2)
        u = torch.zeros(self.features(info), config.r // 2 if pairs else config.r)
        if not u.is_meta:
            nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        u = u.repeat_interleave(2, dim=1) if pairs else u
        return {"hra_u": nn.Parameter(u), "hra_r": config.r, "hra_apply_GS": config.apply_GS}

    def rotate(self, s: Any, x: Tensor, transposed: bool = False) -> Tensor:
        if not s.hra_apply_GS:  # W H_1 ... H_r is W's rows turned, so what the input does is the transpose
            return householder_rotate(x, s.hra_u, transposed=not transposed)
        u = orthonormal(s.hra_u.to(torch.promote_types(s.hra_u.dtype, torch.float32)))
        return householder_rotate(x, u, orthonormal=True)


def orthonormal(u: Tensor) -> Tensor:
    """The columns after Gram-Schmidt. One that depends on those before it becomes zero: PEFT normalises its rounding
    errors, which are all that is left of the second of two equal columns, such as its own initialisation has."""
    done: list[Tensor] = []
    for column in u.T:
        rest = column
        for q in done:
            rest = rest - (q @ rest) * q
        norm = rest.norm()
        independent = norm > 100 * torch.finfo(u.dtype).eps * column.norm()
        done.append(torch.where(independent, rest / torch.where(independent, norm, 1.0), 0.0))
    return torch.stack(done, dim=1)
