"""butterfly_rotate, block_rotate: the features of x turned by small blocks, in one or several factors, in one pass.

OFT: arXiv 2306.07280. BOFT: arXiv 2311.06243. Factor i of a butterfly multiplies pairs of half blocks that lie 2^i half
blocks apart; factor 0 is block-diagonal, which is all of `block_rotate`. m factors of blocks of b cost 2 M d b m
operations against 2 M d^2 of a dense rotation. Everything is float32 (float64 for float64) and rounded once: nothing
between two factors leaves the kernel, and the backward computes it again from x.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike, check_floating, rows_of
from ...dispatch import Op, forward_mode
from ..lora_linear import acc_dtype, apply_function


def check_blocks(op: str, x: Tensor, blocks: Tensor) -> None:
    """blocks [m, D or 1, b, b] for rows of d = D * b features."""
    d = x.shape[-1]
    if blocks.dim() != 4 or blocks.shape[-1] != blocks.shape[-2] or min(blocks.shape) < 1:
        raise arg_error(op, "blocks", "[m, D, b, b], or [m, 1, b, b] where one block serves all", tuple(blocks.shape))
    check_floating(op, blocks=blocks)
    m, count, b = blocks.shape[:3]
    if d % b or count not in (1, d // b):
        raise arg_error(op, "blocks", f"for {d} features: [m, D or 1, b, b] with D * b = {d}", tuple(blocks.shape))
    if m > 1 and (b % 2 or (d // b) % 2 ** (m - 1)):
        raise arg_error(op, "blocks", f"of even size, their number divisible by 2^{m - 1}, for {m} factors",
                        f"{d // b} blocks of {b}")  # fmt: skip


def _check(x: Tensor, blocks: Tensor, transposed: bool) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise arg_error("butterfly_rotate", "x", "a floating-point [M, d]", (x.dtype, tuple(x.shape)))
    check_blocks("butterfly_rotate", x, blocks)


def _fake(x: Tensor, blocks: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


def _by_block(x: Tensor, i: int, size: int) -> Tensor:
    """Rows [M, d] as [D, M, size]: what each block of factor i acts on."""
    m, d = x.shape
    if i == 0:
        return x.reshape(m, d // size, size).transpose(0, 1)
    parts = x.reshape(m, d // size >> i, 2, 1 << i, size // 2)  # half blocks that lie 2^i apart belong together
    return parts.permute(1, 3, 0, 2, 4).reshape(d // size, m, size)


def _by_row(parts: Tensor, i: int) -> Tensor:
    """The inverse of `_by_block`."""
    count, m, size = parts.shape
    if i == 0:
        return parts.transpose(0, 1).reshape(m, count * size)
    halves = parts.reshape(count >> i, 1 << i, m, 2, size // 2)
    return halves.permute(2, 0, 3, 1, 4).reshape(m, count * size)


def _steps(blocks: Tensor, transposed: bool) -> Iterable[tuple[int, Tensor]]:
    """(factor, its blocks as they multiply rows from the right), in the order of the multiplications."""
    order = range(len(blocks)) if transposed else reversed(range(len(blocks)))
    return [(i, blocks[i].mT if transposed else blocks[i]) for i in order]


def _turn(x: Tensor, i: int, blocks: Tensor) -> Tensor:
    return _by_row(_by_block(x, i, blocks.shape[-1]) @ blocks, i)


def _reference(x: Tensor, blocks: Tensor, transposed: bool) -> Tensor:
    acc = acc_dtype(x.dtype)
    h = x.to(acc)
    for i, factor in _steps(blocks.to(acc), transposed):
        h = _turn(h, i, factor)
    return h.to(x.dtype).contiguous()


def _flops(x: Tensor, blocks: Tensor, transposed: bool) -> int:
    return 2 * x.numel() * blocks.shape[-1] * blocks.shape[0]


forward_op = Op(
    name="butterfly_rotate",
    schema="(Tensor x, Tensor blocks, bool transposed) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] blocks[F,G,B,B]",
    flops=_flops,
)


def _check_backward(dy: Tensor, x: Tensor, blocks: Tensor, transposed: bool, need_dx: bool, need_dblocks: bool) -> None:
    _check(x, blocks, transposed)
    check_alike("butterfly_rotate_backward", "dy", dy, x)


def _fake_backward(
    dy: Tensor, x: Tensor, blocks: Tensor, transposed: bool, need_dx: bool, need_dblocks: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, blocks.new_empty(blocks.shape if need_dblocks else (0,))


def _reference_backward(
    dy: Tensor, x: Tensor, blocks: Tensor, transposed: bool, need_dx: bool, need_dblocks: bool
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    g, h, dblocks = dy.to(acc), x.to(acc), torch.zeros_like(blocks, dtype=acc)
    steps = list(_steps(blocks.to(acc), transposed))
    inputs = []
    for i, factor in steps if need_dblocks else ():
        inputs.append(h)
        h = _turn(h, i, factor)
    for i, factor in reversed(steps):
        if need_dblocks:
            size = factor.shape[-1]
            each = _by_block(inputs.pop(), i, size).mT @ _by_block(g, i, size)
            dblocks[i] = (each.mT if transposed else each).sum_to_size(dblocks[i].shape)
        g = _turn(g, i, factor.mT)
    dx = g.to(x.dtype).contiguous() if need_dx else x.new_empty((0,))
    return dx, dblocks.to(blocks.dtype) if need_dblocks else blocks.new_empty((0,))


def _flops_backward(dy: Tensor, x: Tensor, blocks: Tensor, transposed: bool, need_dx: bool, need_dblocks: bool) -> int:
    m = blocks.shape[0]
    passes = (2 * m + (m - 1) + (0 if need_dx else -1)) if need_dblocks else m
    return 2 * x.numel() * blocks.shape[-1] * passes


backward_op = Op(
    name="butterfly_rotate_backward",
    schema=(
        "(Tensor dy, Tensor x, Tensor blocks, bool transposed, bool need_dx, bool need_dblocks) -> (Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,K] x[M,K] blocks[F,G,B,B]",
    flops=_flops_backward,
)


class _ButterflyRotate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, blocks: Tensor, transposed: bool) -> Any:
        return forward_op.op(x, blocks, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        x, blocks, ctx.transposed = inputs
        ctx.save_for_backward(x if blocks.requires_grad else None, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks = ctx.saved_tensors
        need_dx, need_dblocks = ctx.needs_input_grad[:2]
        dy = dy.contiguous()
        if not need_dblocks:  # the transpose undoes the rotation, and x is not needed
            return forward_op.op(dy, blocks.detach(), not ctx.transposed) if need_dx else None, None, None
        dx, dblocks = backward_op.op(dy, x, blocks.detach(), ctx.transposed, need_dx, True)
        return dx if need_dx else None, dblocks, None


def butterfly_rotate(x: Tensor, blocks: Tensor, transposed: bool = False) -> Tensor:
    """`x O` with O = M_{m-1} ... M_1 M_0, or `x O^T`; differentiable in x and blocks.

    x: [..., d] float32, bfloat16, float16 (float64 on the reference). blocks: [m, D, b, b] with D * b = d, or
    [m, 1, b, b] where a factor has one block for all places; in a dtype of their own. Factor i multiplies the two half
    blocks at places p and p + 2^i (of 2^(i + 1) in a row) by one block from the right; with several factors b must be
    even and D divisible by 2^(m - 1). transposed: the other order of factors, each block transposed, which undoes the
    rotation where the blocks are orthogonal. Returns [..., d] in x.dtype. Nothing but x and the blocks is kept for
    the backward. Raises ValueError or TypeError on bad arguments.
    """
    d = x.shape[-1] if x.dim() else 0
    rows = rows_of("butterfly_rotate", x, d)
    if (torch.is_grad_enabled() and (x.requires_grad or blocks.requires_grad)) or forward_mode():
        y: Tensor = apply_function(_ButterflyRotate, rows, blocks, transposed)
    else:
        y = forward_op.op(rows, blocks, transposed)
    return y if x.dim() == 2 else y.reshape(x.shape)


def block_rotate(x: Tensor, blocks: Tensor, transposed: bool = False) -> Tensor:
    """x [..., D * b] times a block-diagonal matrix: `butterfly_rotate` of one factor.

    blocks: [D, b, b], or [1, b, b] where one serves all; transposed: each block transposed.
    """
    return butterfly_rotate(x, blocks.unsqueeze(0), transposed)
