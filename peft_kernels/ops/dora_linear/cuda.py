"""The CUDA backend of dora_linear: lora_linear's, whose kernels end with the gain; without dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...cuda_rt import backend
from ..lora_linear.cuda import BACKWARD_ROWS, DTYPES, ROWS, queue, refuse_rows, refuse_weight
from ..lora_linear.native import backward_arguments, forward_arguments, pack

_DROPOUT = "serves no dropout, which takes a second product with the weight"


def _when_forward(x: Tensor, *args: Any) -> str | None:
    *weight, _, a, b, _gain, _scaling, bias, dropout_p, _seed, _h = args
    why = _DROPOUT if dropout_p > 0.0 else refuse_rows(ROWS, x)
    return why or refuse_weight(*weight, x.shape[1], a, b, bias)


def _when_backward(dy: Tensor, x: Tensor, *args: Any) -> str | None:
    *weight, a, b, _gain, _h, _s, _scaling, dropout_p, _seed, _dx, _ab, _dgain = args
    why = _DROPOUT if dropout_p > 0.0 else refuse_rows(BACKWARD_ROWS, x)
    return why or refuse_weight(*weight, x.shape[1], a, b, None)


def forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, N], h [M, N] or empty, s [M, r])."""
    *weight, a, b, gain, scaling, bias, _, _, need_h = args
    x, gain = x.contiguous(), gain.contiguous()
    own, y, s = forward_arguments(x, *weight, a, b, scaling, bias, 0.0, None)
    h = torch.empty_like(y) if need_h else x.new_empty((0,))
    packed = pack(0, x, *own, y=y, s=s, gain=gain, h=h if need_h else None)
    queue(native.cuda().pk_cuda_lora_linear, packed, own[5], False, x, own[0])
    return y, h, s


def backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [M, K], da [r, K], db [N, r], dgain [N]); empty where not needed."""
    *weight, a, b, gain, h, s, scaling, _, _, need_dx, need_ab, need_gain = args
    own, dy, s, da, db = backward_arguments(dy, *weight, a, b, s, scaling, 0.0, None, need_ab)
    x, gain = x.contiguous(), gain.contiguous()
    h = h.contiguous() if need_gain else None
    dx = x.new_empty(x.shape if need_dx else (0,))
    dgain = gain.new_empty(gain.shape if need_gain else (0,))
    packed = pack(0, x, *own, s=s, dy=dy, dx=dx if need_dx else None, da=da if need_ab else None,
                  db=db if need_ab else None, gain=gain, h=h, dgain=dgain if need_gain else None)  # fmt: skip
    queue(native.cuda().pk_cuda_lora_linear_backward, packed, own[5], True, dy, own[0])
    return dx, da, db, dgain


BACKENDS = {
    "dora_linear": backend(forward, dtypes=DTYPES, when=_when_forward),
    "dora_linear_backward": backend(backward, dtypes=DTYPES, when=_when_backward),
}
