"""Triton backend of butterfly_linear: the rotation's kernel, then the product's, each once over all rows.

A tile of x that is turned inside of the product is turned again for every BN features of y: BK / BN of the product's
own operations, a half at the tiles of `tuned/`, against one turned copy of x, which is read and written once. What
serves the rotation and the product, Triton or CUDA's kernels, is chosen as where they stand alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_lib import host
from .. import butterfly_rotate as turning
from .. import lora_linear as base

_NO_ADAPTER = (None, None, 1.0)


def forward(x: Tensor, blocks: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(y [M, N], h [M, N] or empty)."""
    *weight, n, gain, bias, need_h = args
    none, turned = x.new_empty((0,)), turning.forward_op.op(x, blocks, False)
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
