"""A mixture of LoRA adapters of one layer, with a weight of each for every token: X-LoRA's and Arrow's mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import Fingerprint, lora_mixture

from ..fused import Fused
from ..method import AdaptedLayer


class Mixed(NamedTuple):
    """Adapters as `peft_kernels.lora_mixture` takes them: A [r_i, in] and B [out, r_i], in lists or one on the other,
    weights [..., n] for the tokens of x, and what each product is multiplied by. masked: weights of zero are a
    choice's, which has no gradient."""

    a: Tensor | Sequence[Tensor]
    b: Tensor | Sequence[Tensor]
    mix: Tensor
    scaling: Sequence[float]
    masked: bool


class Kept:
    """A value that stays for as long as the tensors that it came from are the same objects, in their places, and
    nothing wrote to them. Threads may share it.

    `Cache` keeps nothing where a fingerprint cannot tell, as of tensors on a GPU. There this goes by places and
    versions, since what it keeps takes dozens of launches, and keeps nothing of tensors that train: a fused optimizer
    leaves no version."""

    def __init__(self) -> None:
        self._last: tuple[list[Tensor], list[Any], Fingerprint, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has tensors of its own
        return Kept, ()

    def get(self, tensors: list[Tensor], version: int, make: Callable[[], Any]) -> Any:
        """make(), without gradients, or what it gave last for that version of the layer. In a graph it is computed
        there."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return make()
        seen = [version, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)]
        last = self._last
        if last is None or seen != last[1] or not all(map(is_, tensors, last[0])) or not _untouched(last[2], tensors):
            with torch.inference_mode(False), torch.no_grad():
                last = list(tensors), seen, Fingerprint(tensors), make()
            self._last = last if _untouched(last[2], tensors) else None
        return last[3]


def _untouched(seen: Fingerprint, tensors: list[Tensor]) -> bool:
    """True for tensors that nothing wrote to, by their fingerprint; where that cannot tell, if none of them trains."""
    return seen.unchanged() if seen.known else not any(t.requires_grad for t in tensors)


def together(kept: Kept, version: int, a: list[Tensor], b: list[Tensor]) -> tuple[Any, Any]:
    """Frozen adapters of one rank on each other, so that no call does it again; others as they are. version: the
    layer's."""
    every = [*a, *b]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in every)):
        return a, b
    if len({t.shape for t in a}) > 1 or len({t.dtype for t in every}) > 1 or any(t.is_inference() for t in every):
        return a, b

    def joined() -> tuple[Tensor, Tensor]:
        return torch.stack(a), torch.stack(b, 1).transpose(0, 1)  # B [out, n, r] in memory, as kernels read it

    found: tuple[Tensor, Tensor] = kept.get(every, version, joined)
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

    def call(x: Tensor, w: Any, bias: Tensor | None) -> Tensor | None:
        found = of(x)
        if found is None:
            return None
        y: Tensor = lora_mixture(x, w, found.a, found.b, found.mix, found.scaling, bias, masked=found.masked)
        return y

    return layer.base.fused(call)
