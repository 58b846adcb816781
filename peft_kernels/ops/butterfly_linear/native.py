"""The native CPU backend of butterfly_linear: lora_linear's kernels on rows that are turned some at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ..lora_linear.native import backend, backward_arguments, forward_arguments, pack, refusal

_NONE = (None, None, 1.0)  # a, b, scaling


def _when_forward(x: Tensor, blocks: Tensor, *args: Any) -> str | None:
    return refusal(args[0], args[5], None, None, args[10])


def _when_backward(dy: Tensor, x: Tensor, blocks: Tensor, *args: Any) -> str | None:
    return refusal(args[0], args[5], None, None, None)


def _factors(x: Tensor, blocks: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(blocks as the library takes them; b, m, shared)."""
    m, count, b = blocks.shape[:3]
    return blocks.to(torch.float32).contiguous(), (b, m, int(count * b != x.shape[1]))


def forward(x: Tensor, blocks: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(y [M, N], h [M, N] or empty)."""
    *weight, gain, bias, need_h = args
    x, (factors, sizes) = x.contiguous(), _factors(x, blocks)
    own, y, _ = forward_arguments(x, *weight, *_NONE, bias, 0.0, None)
    gain = None if gain is None else gain.contiguous()
    h = torch.empty_like(y) if need_h else x.new_empty((0,))
    packed = pack(torch.get_num_threads(), x, *own, y=y, gain=gain, h=h if need_h and gain is not None else None)
    native.check(native.cpu().pk_cpu_butterfly_linear(packed, factors.data_ptr(), *sizes))
    return y, h


def backward(dy: Tensor, x: Tensor, blocks: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, K], dblocks, dgain [N]); empty where not needed."""
    *weight, gain, h, need_dx, need_dblocks, need_gain = args
    own, dy, *_ = backward_arguments(dy, *weight, None, None, None, 1.0, 0.0, None, False)
    x, (factors, sizes) = x.contiguous(), _factors(x, blocks)
    gain = None if gain is None else gain.contiguous()
    h = h.contiguous() if need_gain else None
    dx = x.new_empty(x.shape if need_dx else (0,))
    dblocks = torch.empty_like(factors) if need_dblocks else blocks.new_empty((0,))
    dgain = torch.empty(dy.shape[1] if need_gain else 0, dtype=torch.float32)
    packed = pack(torch.get_num_threads(), x, *own, dy=dy, dx=dx if need_dx else None, gain=gain, h=h,
                  dgain=dgain if need_gain else None)  # fmt: skip
    native.check(native.cpu().pk_cpu_butterfly_linear_backward(
        packed, factors.data_ptr(), *sizes, dblocks.data_ptr() if need_dblocks else None
    ))  # fmt: skip
    return dx, dblocks.to(blocks.dtype), dgain


BACKENDS: dict[str, Backend] = {
    "butterfly_linear": backend(forward, _when_forward),
    "butterfly_linear_backward": backend(backward, _when_backward),
}
