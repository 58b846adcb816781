"""LoRA's matrices of the experts of a mixture, which are one parameter: an A and a B for each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...weights.base import acts_in_calls


def by_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, out, r] of the matrices of all experts: ranks by expert in A, experts by rank in B."""
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def delta_of(a: Tensor, b: Tensor, experts: int, scaling: float) -> Tensor:
    """scaling B A of each expert, [E, out, in]."""
    into, back = by_expert(a, b, experts)
    return torch.baddbmm(into.new_zeros(()), back, into, beta=0, alpha=scaling)


def factors(s: Any) -> tuple[Tensor, Tensor, float] | None:
    """`Method.expert_factors` of plain LoRA; None where something of it is more than two matrices and a number."""
    plain = all(type(m) is nn.Linear and not acts_in_calls(m) for m in (s.lora_A, s.lora_B))
    drops = type(s.lora_dropout) is not nn.Identity and s.lora_dropout.p > 0
    if not plain or drops or s.lora_bias or not s.get("experts") or isinstance(s.scaling, Tensor):
        return None
    return *by_expert(s.lora_A.weight, s.lora_B.weight, s.experts), float(s.scaling)
