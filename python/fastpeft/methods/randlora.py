"""RandLoRA: W + scaling * B C, a full-rank update from n random bases of rank r (arXiv 2502.00987).

A [r, min(in, out)] and B [max(in, out), n r], with n r >= min(in, out), are frozen and shared by all layers. Trained
are lambda [r, n] and gamma [n, min], which make n matrices of A: C[k n + b, j] = lambda[k, b] A[k, j] gamma[b, j].
Where the layer has more inputs than outputs it is C^T B^T that is added.

Cost, in products of the layer's size (the frozen layer has two): one for C and one for B in the forward and in the
backward towards x, and one more for the gradient of C, of which those of lambda and gamma are sums: 3.5 times the
frozen layer's FLOPs. Saved is the input and, with C on the output side, B^T x; C is elementwise in A and made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, HasProjection, TargetConfig
from ..weights.base import wide
from .math.draws import drawn_normal
from .math.factored import dropout
from .math.projections import ProjectedMethod
from .method import Inner, LayerInfo, State

Shape = tuple[int, int, int]


@dataclass
class RandLoraConfig(HasProjection, HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="RANDLORA"):
    """r: the rank of a basis; a smaller one trains more. sparse, very_sparse: bases of -1, 0 and 1, of which a third,
    or one in sqrt(min), is not 0. randlora_dropout: of the input. randlora_alpha: scaling is this over r."""

    not_in_peft = ("exclude_modules",)

    r: int = 32
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: int = 640


class RandLora(ProjectedMethod, config=RandLoraConfig):
    tensors = ("randlora_lambda", "randlora_gamma")
    projections = ("randlora_A", "randlora_B")
    repeats_shared = True
    counts = ("r",)
    examples = (
        {"r": 3, "randlora_alpha": 4}, {"r": 6, "randlora_alpha": 4, "sparse": True, "save_projection": False},
        {"r": 25, "randlora_alpha": 9, "very_sparse": True, "init_weights": False},
    )  # fmt: skip

    def make_shared(self, config: RandLoraConfig, layers: Sequence[LayerInfo]) -> State:
        sizes = max(i.in_features for i in layers), max(i.out_features for i in layers)
        shapes = (config.r, 1, min(sizes)), (max(sizes), math.ceil(min(sizes) / config.r), config.r)
        return self.drawn(config, shapes, lambda generator: _bases(config, shapes, generator))

    def make_state(self, config: RandLoraConfig, info: LayerInfo, shared: Any) -> State:
        small, large = sorted((info.in_features, info.out_features))
        n = math.ceil(small / config.r)
        lambdas, gammas = drawn_normal(config.r, n), torch.ones(n, small) / large
        if config.init_weights:
            lambdas.zero_()
            gammas.fill_(1 / max(gammas.shape))
        return {
            "r": config.r, "scaling": config.randlora_alpha / config.r,
            "randlora_dropout": dropout(config.randlora_dropout),
            "randlora_lambda": nn.Parameter(lambdas), "randlora_gamma": nn.Parameter(gammas),
        }  # fmt: skip

    def _parts(self, s: Any, shared: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        lambdas, gammas = s.randlora_lambda, s.randlora_gamma
        n, small = gammas.shape
        a = shared.randlora_A[:, 0, :small]
        b = shared.randlora_B[: max(s.in_features, s.out_features), :n].flatten(1)
        return tuple(t.to(lambdas.device, dtype or lambdas.dtype) for t in (lambdas, gammas, a, b))

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        lambdas, gammas, a, b = self._parts(s, shared, wide(s.randlora_lambda.dtype))
        delta: Tensor = b @ (lambdas[:, :, None] * a[:, None] * gammas).flatten(0, 1) * s.scaling
        return delta if s.in_features <= s.out_features else delta.t()

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        parts = self._parts(s, shared)
        x = s.randlora_dropout(x.to(parts[0].dtype))
        with torch.autocast(x.device.type, enabled=False):  # it writes into tensors of its inputs' dtype
            rows = x.flatten(0, -2)
            added: Tensor = _Update.apply(rows, *parts, s.in_features <= s.out_features)  # type: ignore[no-untyped-call]
        return torch.add(y, added.view(y.shape), alpha=s.scaling)


def _bases(config: RandLoraConfig, shapes: tuple[Shape, Shape], generator: torch.Generator) -> tuple[Tensor, ...]:
    """A and B of standard deviation 1, with the numbers that PEFT draws."""
    if config.sparse or config.very_sparse:
        edge = 1 / (2 * (math.sqrt(shapes[0][2]) if config.very_sparse else 3.0))
        uniform = [torch.rand(shape, generator=generator) for shape in shapes]
        a, b = ((u > 1 - edge).float() - (u < edge).float() for u in uniform)
    else:  # in bfloat16, and B a basis at a time
        count = shapes[1][1]
        a = _uniform(shapes[0], generator)
        b = torch.cat([_uniform((shapes[1][0], 1, config.r), generator) for _ in range(count)], dim=1)
    return (a / a.std()).float(), (b / b.std()).float()


def _uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _scaled(lambdas: Tensor, gammas: Tensor, a: Tensor) -> Tensor:
    """C [n r, min]."""
    return (a[:, None] * gammas).mul_(lambdas[:, :, None]).flatten(0, 1)


class _Update(torch.autograd.Function):
    """x [T, in] -> C, then B; without `inward` B^T, then C^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lambdas: Tensor, gammas: Tensor, a: Tensor, b: Tensor, inward: bool) -> Tensor:
        c = _scaled(lambdas, gammas, a)
        ctx.inward = inward
        h = x @ (c.t() if inward else b)
        ctx.save_for_backward(x if inward else h, lambdas, gammas, a, b)
        return h @ (b.t() if inward else c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, lambdas, gammas, a, b = ctx.saved_tensors
        dx = dlambda = dgamma = None
        with torch.autocast(dy.device.type, enabled=False):
            c = _scaled(lambdas, gammas, a) if ctx.needs_input_grad[0] else None
            dh = dy @ b if ctx.inward else dy
            if c is not None:
                dx = dh @ c if ctx.inward else dy @ c.t() @ b.t()
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dc = torch.mm(*((dh.t(), saved) if ctx.inward else (saved.t(), dy)), out=c).view(*lambdas.shape, -1)
                by_basis = dc.mul_(a[:, None]).transpose(0, 1)
                dlambda = (by_basis @ gammas[..., None])[..., 0].t()
                dgamma = (lambdas.t()[:, None] @ by_basis)[:, 0]
        return dx, dlambda, dgamma, None, None, None
