"""A mixture of LoRA adapters of one layer, with a weight of each for every token: X-LoRA's and Arrow's mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels import PreparedCall, lora_mixture

from ..fused import Fused
from ..method import AdaptedLayer
from .cache import Cache


class Mixed(NamedTuple):
    """Adapters as `peft_kernels.lora_mixture` takes them: A [r_i, in] and B [out, r_i], in lists or one on the other,
    weights [..., n] for the tokens of x, and what each product is multiplied by. masked: weights of zero are a
    choice's, which has no gradient."""

    a: Tensor | Sequence[Tensor]
    b: Tensor | Sequence[Tensor]
    mix: Tensor
    scaling: Sequence[float]
    masked: bool


def layer_state(s: Any) -> tuple[int, ...]:
    """The numbers that values of a layer's adapters are kept by. A graph keeps none, and has no guard on them."""
    return () if torch.compiler.is_compiling() else (s.version,)


def together(kept: Cache, state: tuple[int, ...], a: list[Tensor], b: list[Tensor]) -> tuple[Any, Any]:
    """Frozen adapters of one rank on each other, so that no call does it again; others as they are. state:
    `layer_state`."""
    every = [*a, *b]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in every)):
        return a, b
    if len({t.shape for t in a}) > 1 or len({t.dtype for t in every}) > 1 or any(t.is_inference() for t in every):
        return a, b

    def joined() -> tuple[Tensor, Tensor]:
        return torch.stack(a), torch.stack(b, 1).transpose(0, 1)  # B [out, n, r] in memory, as kernels read it

    found: tuple[Tensor, Tensor] = kept.get(every, state, joined)
    return found


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.of, ctx.leaves = held[0], leaves
        return held[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [t for t in ctx.leaves if t.requires_grad]
        found = iter(torch.autograd.grad(ctx.of, wanted, dy, retain_graph=True, allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in ctx.leaves)


def apart(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """A tensor apart from its graph, to whose leaves its backward goes, any number of times: layers in reentrant
    checkpoints go backward one by one, and each frees the graph that it came through."""
    found: Tensor = _Apart.apply([value], *leaves)  # type: ignore[no-untyped-call]
    return found


def added(x: Tensor, mixed: Mixed) -> Tensor:
    """The sum of the adapters' products with x, each by its weights."""
    ranks = [t.shape[0] for t in mixed.a]
    weights = mixed.mix * mixed.mix.new_tensor(mixed.scaling)
    each = torch.tensor(ranks, device=x.device)
    low = x @ torch.cat([*mixed.a]).mT
    low = low * weights.repeat_interleave(each, -1, output_size=sum(ranks)).to(low.dtype)
    return low @ torch.cat([*mixed.b], 1).mT


def fused(layer: AdaptedLayer, of: Callable[[Tensor], Mixed | None]) -> Fused | None:
    """The layer as one call of the kernel. of: the mixture for an input, None where the kernel does not serve."""
    prepared = PreparedCall(lora_mixture)
    factors: list[tuple[float, ...]] = [()]  # of the last call: the same object, for the prepared call to hold

    def call(x: Tensor, w: Any, bias: Tensor | None) -> Tensor | None:
        found = of(x)
        if found is None:
            return None
        scaling, last = tuple(found.scaling), factors[0]
        if scaling == last:
            scaling = last
        else:
            factors[0] = scaling
        y: Tensor = prepared(x, w, found.a, found.b, found.mix, scaling, bias, 0.0, None, found.masked)
        return y

    return layer.base.fused(call)
