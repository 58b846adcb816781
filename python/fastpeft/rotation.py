"""Rotations of a layer's input: their parametrisations, block-diagonal ones, and the base of the methods that use them.

A rotation is never a matrix of the layer's size: blocks are multiplied as a batch, everything else is up to a method.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .method import Inner, LayerInfo, Method

MIN_BLOCK = 32  # smaller blocks are multiplied several at a time, as one block: a batch of tiny products is slower


def skew(vector: Tensor, size: int) -> Tensor:
    """[..., n] entries above the diagonal, row by row, as skew-symmetric matrices [..., size, size]."""
    i, j = torch.triu_indices(size, size, 1, device=vector.device)
    upper = vector.new_zeros(*vector.shape[:-1], size * size).index_copy(-1, i * size + j, vector)
    upper = upper.view(*vector.shape[:-1], size, size)
    return upper - upper.mT


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """(I + Q) (I - Q)^-1, orthogonal for a skew-symmetric Q; in at least float32.

    terms: PEFT's truncation of I + 2 (Q + Q^2 + ...) instead, in which the last power counts once.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    if terms is None:
        solved: Tensor = torch.linalg.solve(eye - q, eye + q, left=False)
        return solved
    if terms <= 2:
        return eye + 2 * q if terms == 2 else eye.expand_as(q)
    square, last = q @ q, max(terms - 1, 3)
    pair = 2 * eye + 2 * q  # two powers at a time, from the highest down
    result = 2 * eye + q if last % 2 else pair + square
    for _ in range((last - 3) // 2):
        result = pair + square @ result
    return pair - eye + square @ result


class _BlockRotation(torch.autograd.Function):
    """x [..., D * H] times blocks [D, H, H]; keeps x as it came and the blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x, blocks)
        return _multiply(x, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, blocks = ctx.saved_tensors
        (g,) = grads
        dx = _multiply(g, blocks.mT).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, torch.bmm(_by_block(x, blocks).mT, _by_block(g, blocks))


def _by_block(x: Tensor, blocks: Tensor) -> Tensor:
    return x.reshape(-1, blocks.shape[0], blocks.shape[1]).to(blocks.dtype).transpose(0, 1)


def _multiply(x: Tensor, blocks: Tensor) -> Tensor:
    return torch.bmm(_by_block(x, blocks), blocks).transpose(0, 1).reshape(x.shape).to(x.dtype)


def rotate_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., D * H] with each of its D parts multiplied by its block of [D, H, H], or all by the one of [1, H, H]."""
    size = blocks.shape[-1]
    count = x.shape[-1] // size
    if len(blocks) == 1:
        blocks = blocks.expand(count, size, size)
    together = _gcd(count, max(MIN_BLOCK // size, 1))
    if together > 1:
        parts = blocks.reshape(count // together, together, size, size).permute(0, 2, 3, 1)
        blocks = torch.diag_embed(parts, dim1=1, dim2=3).reshape(-1, together * size, together * size)
    return _BlockRotation.apply(x, blocks)  # type: ignore[no-any-return, no-untyped-call]


def _gcd(a: int, b: int) -> int:
    while b:  # math.gcd takes no symbolic sizes
        a, b = b, a % b
    return a


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
            raise ValueError(
                f"{self.peft_type.value} rotates all channels together and {info.name!r} keeps them in "
                f"{info.groups} groups: do not target it."
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
