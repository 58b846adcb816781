"""Triton backend of butterfly_linear: few rows of x are turned inside of the product, others by a kernel before.

A tile of x that is turned inside of the product is turned again for every BN features of y: 2 BM K b operations and
K b numbers of the blocks, read and split, for each. With few rows that is less than a second launch; with many it is
BK / BN of the product's own work, against one turned copy of x, which is read and written once. What serves the
rotation and the product then, Triton or CUDA's kernels, is chosen as where they stand alone. The backward always goes
through `dy W` in memory, which the gradient of the blocks is made from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host
from .. import butterfly_rotate as turning
from .. import lora_linear as base
from ..lora_linear import triton as linear

_NO_ADAPTER = (None, None, 1.0)
WIDEST = 32  # of a block in a product's tile: 64 take 1.5 to 3 times the instructions of the product alone
BN = 128  # features of a tile of "turned"
# By machine code (`python -m bench --static`): instructions for a number of the blocks, and for a 4-bit weight beyond
# what CUDA's product takes, in 32 lanes; and what 2 to 3 microseconds of an A100 or H100 have, which is the time of a
# launch that others wait for.
PER_BLOCK, PER_WEIGHT, LAUNCH = 8, 4, 1 << 26


def _inside(x: Tensor, blocks: Tensor, weight: list[Any], n: int, bias: Tensor | None) -> linear._Weight | None:
    """The weight of a product that x is turned inside of; None where it is turned before."""
    (m, k), (factors, _, b, _) = x.shape, blocks.shape
    if factors > 1 or b > WIDEST or b & (b - 1) or k % 16 or x.dtype is torch.float32 or not m * n:
        return None
    w = linear._Weight(*weight, n, k, x.dtype)
    shape = tuning.Shape(m, n, k, 0, x.element_size() * 8, w.plain, w.blocksize)
    if not w.plain or not tuning.rows("turned", tuning.arch_of(x.device), shape):
        return None
    each = PER_BLOCK * max(16, b) / BN
    if weight[5] and base.forward_op.choose((x, *weight, n, *_NO_ADAPTER, bias, 0.0, None)).name == "cuda":
        each += PER_WEIGHT
    return w if n * k * each <= LAUNCH else None


def forward(x: Tensor, blocks: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(y [M, N], h [M, N] or empty)."""
    *weight, n, gain, bias, need_h = args
    none = x.new_empty((0,))
    w = _inside(x, blocks, weight, n, bias)
    if w is not None:
        y = x.new_empty((x.shape[0], n))
        kept = torch.empty_like(y) if need_h and gain is not None else None
        after = None if gain is None else linear.Gain(gain.contiguous(), kept, False)
        turn = linear.Turn(blocks[0].to(torch.float32).contiguous())
        arch = tuning.arch_of(x.device)
        linear.product(x.contiguous(), w, None, None, 1.0, bias, y, arch, after, turn)
        return y, none if kept is None else kept
    turned = turning.forward_op.op(x, blocks, False)
    h = base.forward_op.op(turned, *weight, n, *_NO_ADAPTER, bias if gain is None else None, 0.0, None)[0]
    if gain is None:
        return h, none
    y = gain * h if bias is None else gain * h + bias
    return y.to(x.dtype), h if need_h else none


def backward(dy: Tensor, x: Tensor, blocks: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, K], dblocks, dgain [N]); empty where not needed."""
    *weight, gain, h, need_dx, need_dblocks, need_gain = args
    dx, dblocks = x.new_empty((0,)), blocks.new_empty((0,))
    if need_dx or need_dblocks:
        dh = dy if gain is None else (gain * dy).to(dy.dtype)
        product = base.backward_op.op(dh, x, *weight, None, None, None, 1.0, 0.0, None, True, False)[0]
        dx, dblocks = turning.backward_op.op(product, x, blocks, False, need_dx, need_dblocks)
    dgain = (dy.float() * h.float()).sum(0) if need_gain else x.new_empty((0,), dtype=torch.float32)
    return dx, dblocks, dgain


BACKENDS = host.backends({"butterfly_linear": forward, "butterfly_linear_backward": backward})
