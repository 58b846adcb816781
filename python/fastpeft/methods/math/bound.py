"""`dora_linear` in evaluation: its arguments beside x are checked, and packed for the kernel, once."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import QuantWeight
from peft_kernels.dispatch import PLAIN, forced_backends, watched
from peft_kernels.ops.dora_linear import forward_op
from peft_kernels.ops.dora_linear.native import places
from peft_kernels.ops.lora_linear import flat_weight


class Inference:
    """`dora_linear` of one layer with a gain that is known, where no gradients are recorded and no autocast is on: at
    one token what the public function looks at takes longer than a small layer.

    What the last call found holds (`Op.bind`) for as long as its arguments beside x are the same objects, their memory
    is where it was, and x has one shape. gain: [N] float32, float64 for x in float64.
    """

    def __init__(self) -> None:
        self._bound: _Bound | None = None

    def __call__(
        self, x: Tensor, weight: Tensor | QuantWeight, a: Tensor, b: Tensor, gain: Tensor, scaling: float,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
        given, form = (weight, a, b, gain, scaling, bias, forced_backends()), (rows.shape, rows.dtype, rows.device)
        bound, plain = self._bound, type(x) in PLAIN and not watched()
        if not plain or bound is None or not bound.holds(given, form):
            flat, n, _ = flat_weight("dora_linear", weight)
            args = (rows, *flat, n, a, b, gain, scaling, bias, 0.0, None, False)
            tensors = [t for t in args[1:] if isinstance(t, Tensor)]
            if not plain or not PLAIN.issuperset(map(type, tensors)):
                y: Tensor = forward_op(*args)[0]
                return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
            run = forward_op.bind(*args) or _with(forward_op.settle(*args), args[1:])
            self._bound = bound = _Bound(given, form, tensors, places(tensors), run)
        y = bound.run(rows)[0]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class _Bound(NamedTuple):
    given: tuple[Any, ...]
    form: tuple[torch.Size, torch.dtype, torch.device]  # of x [M, K]
    tensors: list[Tensor]
    places: list[tuple[Any, ...]]
    run: Callable[[Tensor], Any]

    def holds(self, given: tuple[Any, ...], form: tuple[Any, ...]) -> bool:
        return all(map(is_, given, self.given)) and form == self.form and places(self.tensors) == self.places


def _with(run: Callable[..., Any], rest: tuple[Any, ...]) -> Callable[[Tensor], Any]:
    return lambda x: run(x, *rest)
