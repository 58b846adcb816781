"""`gated_mlp` of one layer, call after call, on the native CPU backend without gradients
(`peft_kernels.PreparedCall`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...prepared import Prepared, native_serves, prepares
from ..lora_linear.native import Row
from ..lora_linear.prepared import LoraCall
from ..lora_linear.prepared import inference as single
from ..lora_linear_stacked.prepared import StackedCall
from ..lora_linear_stacked.prepared import inference as together
from . import FUSED, Activation, activation, forward_op, fused_as, parts_of
from .mlp import gated_mlp
from .native import forward, row


class MlpCall(Prepared):
    """Without gradients: three native calls, and nothing that Python would look at between them."""

    def __init__(self, x: Tensor, first: StackedCall, last: LoraCall, numbers: Activation, fused: int) -> None:
        super().__init__(x, [*first.tensors, *last.tensors])
        self._first, self._last, self._numbers, self._fused = first, last, numbers, fused
        self._down = Row([last.packed], [(last.n, last.r)], x.element_size())
        # features of h, and where up begins in a row of all that the first products make; gate alone has none
        self._n = last.k
        self._up = 1 if fused == FUSED["pairs"] else last.k if fused or len(first.sizes) > 1 else 0

    def run(self, x: Tensor) -> Tensor:
        if x.numel() == self.k > 0:  # a token
            y = self._down(row(self._first.row(x.contiguous()), self._n, self._up, *self._numbers))
            return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
        ys = self._first.run(x if x.dim() == 2 else x.reshape(-1, self.k))
        gate, up = parts_of(ys[0], self._fused) if self._fused else (ys[0], ys[1] if len(ys) > 1 else None)
        y = self._last.run(forward(gate, up, *self._numbers))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _inference(x: Tensor, arguments: tuple[Any, ...]) -> MlpCall | None:
    gate, up, down, act, fused, alpha, limit, shift = _full(*arguments)
    numbers, joined = activation("gated_mlp", act, alpha, limit, shift), fused_as("gated_mlp", fused, up)
    first = together(x, (gate,) if up is None else (gate, up))
    if first is None or down.dropout_p:
        return None
    widths = {n for n, _ in first.sizes}
    if len(widths) > 1 or (joined and first.sizes[0][0] % 2):
        return None
    row = x.detach().new_empty((1, widths.pop()))
    parts = parts_of(row, joined) if joined else (row, None if up is None else row)
    if not native_serves((forward_op, (*parts, *numbers))):
        return None
    last = single(torch.empty_like(parts[0]), tuple(down))
    return None if last is None else MlpCall(x, first, last, numbers, joined)


def _full(gate: Any, up: Any, down: Any, act: str = "silu", fused: str | None = None, alpha: float | None = None,
          limit: float = 0.0, shift: float = 0.0) -> tuple[Any, ...]:  # fmt: skip
    return gate, up, down, act, fused, alpha, limit, shift


prepares(gated_mlp, _inference)
