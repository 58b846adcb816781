"""DEFT: part of what W computes is replaced, in a subspace of the outputs: W + Q (alpha / r R - P^T W), with Q [out, r]
from the trained matrix P. PaRa, its form without R, only removes.

"relu": P^T stands for relu(P)^T and Q = P; "qr": both are P's orthonormal basis. P^T W x is P^T applied to the output
that the layer has anyway, so that all costs what a LoRA costs: 3 r (in + 2 out) / (2 in out) of the layer's FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig
from ..weights.base import widened
from .math.draws import normal_
from .math.factored import FactoredMethod, dropout, plus_product
from .method import Inner, LayerInfo, State


@dataclass
class DeftConfig(HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="DEFT"):
    """r: size of the subspace, at most out_features. decomposition_method: "relu" or "qr". alpha: scaling alpha / r of
    R; None for 1. para: no R. deft_dropout: of R's input. init_weights: start as the identity, where there is an R;
    False: with a random R, of 0.02 init_scale."""

    choices: ClassVar[Any] = {"decomposition_method": ("qr", "relu")}

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    deft_dropout: float = 0.0


class Deft(FactoredMethod, config=DeftConfig):
    tensors = ("deft_P", "deft_R")
    needs_base_weight = True
    counts = ("r",)
    examples = (
        {"r": 3, "alpha": 2},
        {"r": 4, "decomposition_method": "qr"},
        {"r": 25, "decomposition_method": "qr", "init_weights": False},
        {"r": 2, "para": True},
    )

    def make_state(self, config: DeftConfig, info: LayerInfo, shared: Any) -> State:
        r = min(config.r, info.out_features)
        scaling = config.alpha / r if config.alpha else 1.0
        p, w = normal_(torch.empty(info.out_features, r), std=0.02), None
        state: State = {
            "deft_r": r, "deft_decomposition": config.decomposition_method, "deft_init_scale": config.init_scale,
            "deft_para": config.para, "deft_scaling": scaling, "deft_dropout": dropout(config.deft_dropout),
            "deft_P": nn.Parameter(p),
        }  # fmt: skip
        if config.para:
            return state
        if config.init_weights and not p.is_meta:
            w = info.base.read()[0].detach()
        inject = torch.zeros(r, info.in_features)
        if w is None:
            normal_(inject, std=0.02 * config.init_scale)
        elif not w.is_meta:
            inject.copy_(_project(p.to(w.device), config.decomposition_method)[1].t() @ w.float() / scaling)
        return {**state, "deft_R": nn.Parameter(inject)}

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        assert w is not None
        basis, right = _project(s.deft_P, s.deft_decomposition)
        a = -(right.t() @ w.to(right.dtype))
        return a if s.deft_para else a + s.deft_R.to(a.dtype) * s.deft_scaling, basis

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        basis, right = _project(s.deft_P, s.deft_decomposition)
        h, bias = -(y.to(right.dtype) @ right), inner.bias()
        if bias is not None:
            h = h + bias.to(right.dtype) @ right
        if not s.deft_para:
            h = h + F.linear(s.deft_dropout(x.to(right.dtype)), s.deft_R.to(right.dtype)) * s.deft_scaling
        return plus_product(y, h, basis.t())


def _project(p: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Q, and what stands for P in P^T W, in at least float32."""
    p = widened(p)
    if how == "relu":
        return p, torch.relu(p)
    q = torch.linalg.qr(p)[0]
    return q, q
