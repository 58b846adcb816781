"""Matrices of LoRA: parts of weights that processes split (`weights/split.py`), of B the rows, or of A the columns, as
W has them; an orthogonal start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...weights.split import Split
from ..method import LayerInfo, State


class PartLinear(nn.Linear):
    """A linear map with a part of its matrix in each process (dim: the dimension that is split) or all of it (None).

    Parts are DTensors, so that files hold the whole. Without its part of the input, or for a part of the output, it is
    of use between `enter` and `leave` of the layer alone.
    """

    def __init__(self, whole: nn.Linear, split: Split, dim: int | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.split, self._dim = split, dim
        self.weight = held(split, whole.weight, dim)
        bias = None if whole.bias is None else held(split, whole.bias, 0 if dim == 0 else None)
        self.register_parameter("bias", bias)

    def matrix(self) -> Tensor:
        return self.split.own(self.weight)

    def own_bias(self) -> Tensor | None:
        """The bias of this process's part of the output; of a sum's parts the first has it."""
        if self.bias is None:
            return None
        return self.split.own(self.bias) if self._dim == 0 else self.split.once(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.own_bias())


def held(split: Split, tensor: Tensor, dim: int | None) -> nn.Parameter:
    """The first process's values of a parameter, split along `dim` (None: all of them in each process)."""
    if dim is not None:
        return nn.Parameter(split.parted(tensor, dim), requires_grad=tensor.requires_grad)
    return nn.Parameter(split.alike(tensor.detach()), requires_grad=tensor.requires_grad)


def part_out(state: State, info: LayerInfo, dims: Mapping[str, int] | None = None) -> None:
    """Replace a layer's new A and B by the parts of this process: of B the rows where W's are split, else of A the
    columns. dims: the dimension in which another of them is split too."""
    split: Any = info.base.split  # type: ignore[attr-defined]
    dims = {"BA"[split.dim]: split.dim, **(dims or {})}
    for letter in "AB":
        name = f"lora_{letter}" if f"lora_{letter}" in state else f"lora_embedding_{letter}"
        value, dim = state[name], dims.get(letter)
        if isinstance(value, Tensor):
            state[name] = held(split, value, dim)
        elif isinstance(value, nn.Linear):  # else a variant's own
            state[name] = PartLinear(value, split, dim)


def orthogonal(a: Tensor, b: Tensor, info: LayerInfo) -> None:
    """A from the odd and B from the even rows of one orthogonal matrix: B A starts at zero, neither A nor B does.

    (datta0.github.io/posts/rethink-lora-init)
    """
    r = a.shape[0]
    device = a.device
    q = torch.linalg.qr(torch.randn(r, r, device=device)).Q
    a.copy_(torch.randn(info.in_features, r // 2, device=device).mm(q[0::2]).T / 10.0)
    b.copy_(torch.randn(r // 2, info.out_features, device=device).T.mm(q[1::2]) / 10.0)
