"""`lora_mixture` of one layer, call after call, on the native CPU backend without gradients
(`peft_kernels.PreparedCall`): of adapters that lie joined, with other weights of them in each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import PLAIN, in_memory
from ...prepared import Prepared, native_serves, prepares
from ..lora_linear.native import fields, pack
from ..lora_linear.prepared import parts
from . import _weights, forward_op, lora_mixture
from .native import step

_F32 = torch.float32


class MixtureCall(Prepared):
    """Without gradients, for x of any number of rows."""

    packed: tuple[bytes, ...]
    n: int
    sizes: tuple[int, int]  # adapters, ranks of each
    scaling: Any
    strides: tuple[int, ...]  # of b

    def holds(self, x: Tensor, given: tuple[Any, ...]) -> bool:
        return super().holds(x, given) and given[2].stride() == self.strides

    def run_with(self, x: Tensor, own: Any) -> Tensor | None:
        """own: the weights of the adapters; None where only the public function can say what they are."""
        leading = x.shape[:-1]
        known = type(own) in PLAIN and own.is_cpu and own.dtype is _F32 and in_memory(own)
        if not known or own.dim() != x.dim() or own.shape != (*leading, self.sizes[0]):
            return None
        mix = _weights(own, self.scaling, x, [1] * self.sizes[0])
        y = step(self.packed, x.reshape(-1, self.k).contiguous(), self.n, self.sizes, mix.contiguous())
        return y if x.dim() == 2 else y.view(*leading, self.n)


def _inference(x: Tensor, arguments: tuple[Any, ...]) -> MixtureCall | None:
    if len(arguments) < 4:
        return None
    rest = (*arguments, *(1.0, None, 0.0, None, False)[len(arguments) - 4 :])
    weight, a, b, _, scaling, bias, dropout_p, seed, _ = rest
    joined = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim() == 3
    if not joined or 0 in a.shape[:2] or dropout_p or seed is not None or isinstance(scaling, Tensor):
        return None
    held = b.transpose(0, 1)  # as it lies: [N, n, r]
    found = parts(x, (weight, a, held, 1.0, bias), "lora_mixture")
    if found is None:
        return None
    flat, n, tensors, saved = found
    row, (count, r) = x.detach().new_empty((1, x.shape[-1])), a.shape[:2]
    mixed = torch.empty((1, count), dtype=_F32)
    if not native_serves((forward_op, (row, *flat, n, a, held, mixed, True, bias, 0.0, None))):
        return None
    call = MixtureCall(x, [*tensors, b], saved)
    one = a.view(count * r, -1), held.view(n, count * r)
    call.packed = fields(pack(0, row, *flat, n, *one, 1.0, bias, 0.0, None))
    call.n, call.sizes, call.scaling, call.strides = n, (count, r), scaling, b.stride()
    return call


prepares(lora_mixture, _inference)
