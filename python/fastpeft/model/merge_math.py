"""Sums of tensors, some of whose values are pruned first, and the SVD of a product of thin factors.

`ties` (arXiv 2306.01708): keep the largest values, elect a sign for each position and average what has it. `dare_*`
(arXiv 2311.03099): drop values at random and scale up the rest. A list has one tensor per task, `weights` a weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..config.types import warn
from ..weights.base import widened

Method = Literal["magnitude", "random"]
Sign = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """`weights` with as many dimensions as `task_tensors`, which have one more in front than a task's tensor."""
    return weights.view(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of the values with the largest magnitude, zero in place of the others."""
    flat = tensor.reshape(-1)
    kept = torch.topk(flat.abs(), k=int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Each value with the probability `density`, else zero. rescale: divide by it, to keep the expected value."""
    pruned = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return pruned / density if rescale else pruned


def prune(tensor: Tensor, density: float, method: Method, rescale: bool = False) -> Tensor:
    """Prune to a share of the values: the largest ones ("magnitude"), or any ("random")."""
    if density >= 1:
        warn(f"The density {density} is greater than or equal to 1, no pruning will be performed.")
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method}")


def calculate_majority_sign_mask(tensor: Tensor, method: Sign = "total") -> Tensor:
    """True for values with the sign that wins at their position, by the sum or the number ("frequency") of values."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    sign = tensor.sign()
    votes = (tensor if method == "total" else sign).sum(dim=0)
    return sign == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean, at each position, of the tasks that the mask keeps there."""
    return (task_tensors * majority_sign_mask).sum(dim=0) / majority_sign_mask.sum(dim=0).clamp(min=1.0)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    stacked = torch.stack(task_tensors)
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(dim=0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the tensors' largest values."""
    return task_arithmetic([prune(t, density, method="magnitude") for t in task_tensors], weights)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of randomly pruned and rescaled tensors."""
    return task_arithmetic([prune(t, density, method="random", rescale=True) for t in task_tensors], weights)


def ties(task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total") -> Tensor:
    """The weighted mean of the tensors' largest values where they have the sign that wins."""
    return _elected([prune(t, density, method="magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total"
) -> Tensor:  # fmt: skip
    """As `ties`, of randomly pruned and rescaled tensors."""
    pruned = [prune(t, density, method="random", rescale=True) for t in task_tensors]
    return _elected(pruned, weights, majority_sign_method)


def svd_of_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of B A, with A [r, in] and B [out, r], from matrices that are no larger than these."""
    (qa, ra), (qb, rb) = torch.linalg.qr(widened(a).t()), torch.linalg.qr(widened(b))
    u, s, v = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    return qb @ u, s, v @ qa.t()


def _elected(pruned: list[Tensor], weights: Tensor, sign: Sign) -> Tensor:
    stacked = torch.stack(pruned)
    mask = calculate_majority_sign_mask(stacked, method=sign)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
