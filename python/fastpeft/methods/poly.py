"""Poly: y + x A B / r, with A and B each a mixture of n_skills matrices by weights that a router learns for each task
(Polytropon, arXiv 2202.13914); with n_splits > 1 every part of the features has weights of its own (MHR, arXiv
2211.03831).

A and B are mixed apart, so the update is a sum of n_skills^2 products, not of n_skills. They are mixed first: once per
task, or once per row of the batch where these are fewer and in training, which draws weights for each row. That costs
n_skills r (in + out) multiplications each, a product of n_skills tokens, and is kept in evaluation. One call of
`multi_lora_linear` then does the base layer and the rows of every mixture.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_kernels import AdapterStack, multi_lora_linear

from ..config.base import HasInitWeights, TargetConfig
from .fused import Fused
from .math.cache import Cache
from .math.draws import kaiming_
from .math.rotation import constant
from .method import AdaptedLayer, Inner, LayerInfo, Method, State

EPS = 1e-12  # of a sum of weights that is divided by


@dataclass
class PolyConfig(HasInitWeights, TargetConfig, own_type="POLY"):
    """r: rank of each skill. n_tasks: tasks, from 0; a forward has `task_ids`, one for each row. n_skills: pairs of A
    and B that tasks mix. n_splits: parts of the features, each with its own mixture. poly_type: "poly" alone."""

    choices: ClassVar[Any] = {"poly_type": ("poly",)}
    not_in_peft: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")

    r: int = 8
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1


class PolyRouter(nn.Module):
    """The logits of a layer's mixtures [n_tasks, n_splits * n_skills]."""

    def __init__(self, config: PolyConfig) -> None:
        super().__init__()
        self.n_tasks, self.n_splits, self.n_skills = config.n_tasks, config.n_splits, config.n_skills
        self.module_logits = nn.Parameter(torch.empty(config.n_tasks, config.n_splits * config.n_skills))

    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """Weights [tasks, n_splits, n_skills] of tasks (None: of all), drawn in training, each time anew; the skills'
        sum to one."""
        logits = self.module_logits if task_ids is None else self.module_logits[task_ids]
        logits = logits.view(-1, self.n_splits, self.n_skills)
        if self.training:  # as a Bernoulli variable that is relaxed (temperature 1): differentiable in the logits
            chosen: Tensor = torch.distributions.RelaxedBernoulli(temperature=1.0, logits=logits).rsample()  # type: ignore[arg-type]
        else:
            chosen = torch.sigmoid(logits)
        return chosen / (chosen.sum(dim=-1, keepdim=True) + EPS)


class Poly(Method, config=PolyConfig):
    tensors = ("poly_lora_A", "poly_lora_B", "poly_router")
    counts = ("r", "n_tasks", "n_skills", "n_splits")
    divisors: ClassVar[dict[str, tuple[str, ...]]] = {"n_splits": ("in_features", "out_features")}
    mergeable = False
    forward_args = ("task_ids",)
    kernel = "multi_lora_linear"
    examples = ({"r": 3}, {"r": 2, "n_skills": 3, "n_splits": 4, "init_weights": False})

    def make_state(self, config: PolyConfig, info: LayerInfo, shared: Any) -> State:
        splits, skills, r = config.n_splits, config.n_skills, config.r
        a = torch.empty(splits, skills, info.in_features // splits, r)
        b = torch.zeros(splits, skills, r, info.out_features // splits)
        for matrix in (a,) if config.init_weights else (a, b):  # each as a linear layer's weight, in PEFT's order
            for skill in range(skills):
                for split in range(splits):
                    matrix[split, skill] = kaiming_(torch.empty(*matrix.shape[:1:-1])).t()
        router = PolyRouter(config)
        if not router.module_logits.is_meta:
            nn.init.uniform_(router.module_logits, -1e-3, 1e-3)
        return {
            "poly_lora_A": nn.Parameter(a), "poly_lora_B": nn.Parameter(b), "poly_router": router, "r": r,
            "n_tasks": config.n_tasks, "n_skills": skills, "n_splits": splits, "poly_type": config.poly_type,
        }  # fmt: skip

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        return "Poly has no merged form: each task has another weight"

    def row_values(self, config: PolyConfig, inputs: Mapping[str, Any]) -> Sequence[Any] | None:
        """The rows' tasks. ValueError for those that there are not."""
        if (given := inputs.get("task_ids")) is None:
            return None
        ids = torch.as_tensor(given)
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
            raise ValueError(f"task_ids should be one integer for each row, got {ids.dtype} {tuple(ids.shape)}")
        if not torch.compiler.is_compiling() and ids.numel():
            least, most = (int(end) for end in torch.aminmax(ids))
            if most >= config.n_tasks or least < 0:
                found = most if most >= config.n_tasks else least
                raise ValueError(f"Only {config.n_tasks} tasks available. Found task id = {found}")
        return ids.long()  # type: ignore[return-value]  # a tensor has a length and items

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        index, stack = self._mixed(s, x, (Cache(), Cache()))
        a, b = (t.view(-1, s.r, t.shape[1])[index] for t in (stack.a, stack.b))
        given = s.cast(x, a.dtype).reshape(x.shape[0], -1, x.shape[-1])
        return y + (given @ a.mT @ b).reshape(y.shape)  # type: ignore[no-any-return]

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        kept = Cache(), Cache()

        def call(x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
            index, stack = self._mixed(s, x, kept)
            return multi_lora_linear(x, w, stack, index, bias)

        return layer.base.fused(call)

    def _mixed(self, s: Any, x: Tensor, kept: tuple[Cache, Cache]) -> tuple[Tensor, AdapterStack]:
        """The place of each row's mixture in a stack, and the stack of all mixtures."""
        router, device = s.poly_router, s.poly_lora_A.device
        logits, ids = router.module_logits, _tasks(s, x).to(device)
        by_task = not router.training and s.n_tasks <= len(ids)
        weights: list[Tensor] = []  # drawn once for A and B

        def mixed(matrix: Tensor, axes: str, scale: float) -> Tensor:
            if not weights:
                weights.append(router(None if by_task else ids))
            return torch.einsum(f"uqs,{axes}->urqd", weights[0] * scale, matrix).flatten(2).flatten(0, 1)

        pair = []
        for i, (matrix, axes, scale) in enumerate(((s.poly_lora_A, "qsdr", 1.0), (s.poly_lora_B, "qsrd", 1 / s.r))):
            make = functools.partial(mixed, matrix, axes, scale)
            keep = by_task and constant(s, matrix) and constant(s, logits)
            pair.append(kept[i].get((matrix, logits), (), make) if keep else make())
        each = torch.arange(len(pair[0]) // s.r, device=device)
        ones = torch.ones(each.shape, device=device)  # float32, which holds no 1 / r of a layer in float64
        stack = AdapterStack(pair[0], pair[1], each * s.r, torch.full_like(each, s.r), ones, s.r)
        return ids if by_task else each, stack


def _tasks(s: Any, x: Tensor) -> Tensor:
    """The task of each row of x. ValueError where it is not known."""
    rows = s.row_values
    if rows is None:
        if s.n_tasks > 1:
            raise ValueError("task_ids should not be None: Poly needs the task of each row, model(..., task_ids=ids).")
        return torch.zeros(len(x), dtype=torch.int64)
    ids: Tensor = rows if isinstance(rows, Tensor) else torch.stack([*rows])  # these are rows of one
    if len(ids) != len(x):
        raise ValueError(f"task_ids has {len(ids)} tasks, but a layer's input has {len(x)} rows.")
    return ids
