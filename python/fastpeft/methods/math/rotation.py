"""Rotations of a layer's input: skew-symmetric blocks, dropout of blocks, and the base of the methods that turn it.

A rotation is never a matrix of the layer's size: see `peft_kernels.butterfly_rotate` and `householder_rotate`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import butterfly_linear, butterfly_rotate
from peft_kernels.dispatch import forward_mode

from ...config.types import GroupsError
from ..fused import Fused
from ..method import AdaptedLayer, Inner, LayerInfo, Method
from .cache import Cache
from .factored import Weight


def skew(vector: Tensor, size: int) -> Tensor:
    """[..., n] entries above the diagonal, row by row, as skew-symmetric matrices [..., size, size]."""
    i, j = torch.triu_indices(size, size, 1, device=vector.device)
    upper = vector.new_zeros(*vector.shape[:-1], size * size).index_copy(-1, i * size + j, vector)
    upper = upper.view(*vector.shape[:-1], size, size)
    return upper - upper.mT


class BlockDropout(nn.Module):
    """In training: the share p of the blocks of one factor, chosen at random, is the identity. [..., D, H, H]."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, blocks: Tensor) -> Tensor:
        if not self.training:
            return blocks
        factors = blocks.reshape(-1, *blocks.shape[-3:])
        count, size = factors.shape[:2]
        factor = torch.arange(count) == torch.randint(0, count, (1,))  # no number is read: a graph cannot
        chosen = factor[:, None] & (torch.randperm(size) < int(self.p * size))
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        return torch.where(chosen.view(blocks.shape[:-2]).to(blocks.device)[..., None, None], eye, blocks)


def constant(s: Any, parameter: Tensor) -> bool:
    """True if values made of an adapter's parameter in a forward may be kept: no training, no gradient."""
    return not (s.training or (torch.is_grad_enabled() and parameter.requires_grad) or forward_mode())


class RotatesInput(Method):
    """A method that rotates what the layer sees; in a convolution, the patch that a kernel sees, [in * kernel].

    There the weight is rotated, which costs less than rotating every patch.
    """

    kinds = frozenset({"linear", "conv1d", "conv2d", "conv3d"})

    def rotate(self, s: Any, x: Tensor, transposed: bool = False) -> Tensor:
        """x R, or x R^T, for rows x."""
        raise NotImplementedError

    @staticmethod
    def features(info: LayerInfo) -> int:
        """The size of what is rotated."""
        return math.prod(info.shape[1:])

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if info.groups > 1:
            raise GroupsError(
                f"{self.peft_type.value} does not support {type(info.module).__name__} layers with groups > 1: it "
                f"rotates all channels together and {info.name!r} keeps them in {info.groups} groups. Do not target it."
            )

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.rotate(s, w.flatten(1), transposed=True).view(w.shape), b

    def input(self, s: Any, shared: Any, x: Tensor) -> Tensor:
        return self.rotate(s, x)

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        if inner.info.kind.startswith("conv"):
            w, b = self.merged(s, shared, *inner.weight())
            return inner.apply(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
        return super().forward(s, shared, x, inner)

    def splits(self, s: Any, info: LayerInfo) -> bool:
        return not info.kind.startswith("conv")


class Butterfly(RotatesInput):
    """A rotation by butterfly factors; on a linear layer, plain or 4-bit, one call of `butterfly_linear`.

    It is x that is turned however many the tokens are: blocks of a turned weight would have their gradient from
    dy^T x, T N K multiplications, half as many again as the frozen layer takes forward and backward.
    """

    kernel = "butterfly_linear"

    def parameter(self, s: Any) -> Tensor:
        """The parameter that `blocks` are made of, in evaluation alone."""
        raise NotImplementedError

    def blocks(self, s: Any) -> Tensor:
        """[m, D or 1, b, b], as `butterfly_rotate` takes them."""
        raise NotImplementedError

    def gain(self, s: Any) -> Tensor | None:
        """The factors of the layer's features less its bias."""
        return None

    def rotate(self, s: Any, x: Tensor, transposed: bool = False) -> Tensor:
        return butterfly_rotate(x, self.blocks(s), transposed)

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        kept = Cache()

        def call(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
            of = self.parameter(s)
            blocks = kept.get((of,), (), lambda: self.blocks(s)) if constant(s, of) else self.blocks(s)
            return butterfly_linear(x, w, blocks, bias, self.gain(s))

        return layer.base.fused(call)
