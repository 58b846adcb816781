"""HRA: the input is rotated by r Householder reflections, W -> W H_1 ... H_r (arXiv 2405.17484).

In compact WY form H_1 ... H_r = I - U K U^T, with unit columns U [d, r] and K^-1 = I / 2 + (U^T U above the diagonal):
T tokens cost 2 T d r multiplications against T d^2 of the layer, and the backward keeps [T, r]. With Gram-Schmidt
(apply_GS) the columns are orthonormal and K = 2 I.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import PreparedCall, QuantWeight, compact_wy, householder_rotate, lora_linear

from ..config.base import HasBias, HasInitWeights, TargetConfig
from ..config.types import PeftWarning
from ..weights.base import widened
from .adapted import AdaptedLayer
from .fused import Fused
from .math.cache import Cache
from .math.draws import kaiming_
from .math.factored import Weight
from .math.rotation import RotatesInput, constant
from .method import LayerInfo, State


@dataclass
class HRAConfig(HasBias, HasInitWeights, TargetConfig, own_type="HRA"):
    """r: number of reflections; an even one starts as the identity, of pairs that undo each other. apply_GS: make the
    reflections' vectors orthogonal first."""

    r: int = 8
    apply_GS: bool = False


class HRA(RotatesInput):
    prefix = "hra_"
    config_class = HRAConfig
    tensors = ("hra_u",)
    counts = ("r",)
    examples = ({"r": 4}, {"r": 3, "apply_GS": True}, {"r": 8, "init_weights": False}, {"r": 1})

    def make_state(self, config: HRAConfig, info: LayerInfo, shared: Any) -> State:
        pairs = config.init_weights and config.r % 2 == 0
        if config.init_weights and not pairs:
            warnings.warn("The symmetric initialization can NOT be performed when r is odd!", PeftWarning, stacklevel=2)
        u = kaiming_(torch.zeros(self.features(info), config.r // 2 if pairs else config.r))
        u = u.repeat_interleave(2, dim=1) if pairs else u
        return {"hra_u": nn.Parameter(u), "hra_r": config.r, "hra_apply_GS": config.apply_GS}

    def rotate(self, s: Any, x: Tensor, transposed: bool = False) -> Tensor:
        # W H_1 ... H_r is W's rows turned, so what the input does is the transpose
        return householder_rotate(x, *self._vectors(s), transposed=not transposed)

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        """(x - x u^T v) W^T is a LoRA with A = u and B = -(v W^T)^T: no turned x is written, and r more rows of the
        base product, forward and backward, are little where tokens are many."""
        kept, prepared = (Cache(), Cache()), PreparedCall(lora_linear)

        def factors() -> tuple[Tensor, Tensor]:
            return compact_wy(*self._vectors(s), transposed=True)

        def turned(v: Tensor, w: Weight) -> Tensor:
            return lora_linear(v, w).t()

        def call(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor | None:
            of, linear = s.hra_u, lora_linear
            if constant(s, of):  # in evaluation both factors are there already, however few tokens are
                stored = [t for t in w.flatten() if isinstance(t, Tensor)] if isinstance(w, QuantWeight) else [w]
                u = kept[0].get((of,), (s.hra_apply_GS,), lambda: factors()[0])
                b = kept[1].get(
                    (of, *stored), (s.hra_apply_GS,), lambda: turned(factors()[1], w).contiguous()
                )
                linear = prepared  # type: ignore[assignment]
            elif x.numel() < 8 * of.numel():
                return None
            else:
                u, v = factors()
                b = turned(v, w)
            return linear(x, w, u, b, -1.0, bias)

        return layer.base.fused(call)

    @staticmethod
    def _vectors(s: Any) -> tuple[Tensor, bool]:
        """(u, whether its columns are orthonormal)."""
        if not s.hra_apply_GS:
            return s.hra_u, False
        return orthonormal(widened(s.hra_u)), True


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
