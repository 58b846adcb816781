"""`multi_lora_linear` of one layer and one batch's adapters, call after call, on the native CPU backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...formats import AdapterStack
from ...prepared import Prepared, native_serves, plain, prepares
from ..lora_linear.native import fields, pack
from ..lora_linear.prepared import parts
from . import forward_op, multi_lora_linear
from .native import step


class MultiLoraCall(Prepared):
    """Without gradients, for x with as many rows as there are adapters."""

    packed: tuple[bytes, ...]
    plan: tuple[Any, ...]
    n: int

    def holds(self, x: Tensor, given: tuple[Any, ...]) -> bool:
        return x.numel() == len(self.plan[0]) * self.k and super().holds(x, given)

    def run(self, x: Tensor) -> Tensor:
        rows = (x if x.dim() == 2 else x.reshape(-1, self.k)).contiguous()
        y = step(self.packed, rows, self.n, self.stack[0], self.plan)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.n)


def _inference(x: Tensor, given: tuple[Any, ...]) -> MultiLoraCall | None:
    stack: AdapterStack
    weight, stack, adapters, bias, dropout_p, _ = (*given, *(None, 0.0, None)[len(given) - 3 :])
    found = parts(x, (weight, None, None, 1.0, bias), "multi_lora_linear")
    held = plain(stack.a, stack.b, adapters, stack.starts, stack.ranks, stack.scaling)
    if found is None or held is None or dropout_p or x.numel() != adapters.numel() * x.shape[-1]:
        return None
    flat, n, tensors, _ = found
    plan = (adapters, stack.starts, stack.ranks, stack.scaling, stack.max_rank)
    rows = x.detach().new_empty((adapters.numel(), x.shape[-1]))
    if not native_serves((forward_op, (rows, *flat, n, stack.a, stack.b, *plan, bias, 0.0, None))):
        return None
    call = MultiLoraCall(x, given, tensors, stack=held)
    call.packed = fields(pack(0, rows, *flat, n, stack.a, stack.b, 1.0, bias, 0.0, None, plan=plan))
    call.plan, call.n = plan, n
    return call


prepares(multi_lora_linear, _inference)
