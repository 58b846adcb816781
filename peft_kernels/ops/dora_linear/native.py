"""The native CPU backend of dora_linear: lora_linear's kernels, which honour a gain of the columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ..lora_linear.native import again, available, backward_arguments, forward_arguments, pack, refusal

_NO_RANK = "does not serve adapters of rank 0"


def _when_forward(x: Tensor, *args: Any) -> str | None:
    a, b, bias = args[9], args[10], args[13]
    return refusal(*args[:6], a, b, bias) or (None if a.shape[0] else _NO_RANK)


def _when_backward(dy: Tensor, x: Tensor, *args: Any) -> str | None:
    a, b = args[8:10]
    return refusal(*args[:6], a, b, None) or (None if a.shape[0] else _NO_RANK)


def forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, N], h [M, N] or empty, s [M, r])."""
    *weight, a, b, gain, scaling, bias, dropout_p, seed, need_h = args
    x, gain = x.contiguous(), gain.contiguous()
    own, y, s = forward_arguments(x, *weight, a, b, scaling, bias, dropout_p, seed)
    h = torch.empty_like(y) if need_h else x.new_empty((0,))
    packed = pack(torch.get_num_threads(), x, *own, y=y, s=s, gain=gain, h=h if need_h else None)
    code = native.cpu().pk_cpu_lora_linear(packed, 1)
    if code:
        native.check(code)
    return y, h, s


def normed(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(y [M, N], h [M, N] or empty, s [M, r], gain [N], norm [N])."""
    *weight, a, b, magnitude, scaling, bias, dropout_p, seed, need_h = args
    x, magnitude = x.contiguous(), magnitude.contiguous()
    own, y, s = forward_arguments(x, *weight, a, b, scaling, bias, dropout_p, seed)
    h = torch.empty_like(y) if need_h else x.new_empty((0,))
    gain, norm = torch.empty_like(magnitude), torch.empty_like(magnitude)
    packed = pack(torch.get_num_threads(), x, *own, y=y, s=s, gain=gain, h=h if need_h else None)
    code = native.cpu().pk_cpu_dora_linear(packed, magnitude.data_ptr(), gain.data_ptr(), norm.data_ptr())
    if code:
        native.check(code)
    return y, h, s, gain, norm


def bind(x: Tensor, *args: Any) -> Callable[[Tensor], tuple[Tensor, None, Tensor]] | None:
    """`forward` as a function of x, without h; None where a tensor would have to be copied first, or h is wanted."""
    *weight, n, a, b, gain, scaling, bias, dropout_p, seed, need_h = args
    if need_h or dropout_p or not all(t.is_contiguous() for t in args if isinstance(t, Tensor)):
        return None
    shape, small = (x.shape[0], n), (x.shape[0], a.shape[0])
    packed = again(pack(0, x, *weight, n, a, b, scaling, bias, dropout_p, seed, gain=gain))
    run = native.cpu().pk_cpu_lora_linear

    def call(x: Tensor) -> tuple[Tensor, None, Tensor]:
        x = x.contiguous()
        y, s = x.new_empty(shape), x.new_empty(small, dtype=torch.float32)
        code = run(packed(x, y, s), 1)
        if code:
            native.check(code)
        return y, None, s

    return call


def backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [M, K], da [r, K], db [N, r], dgain [N]); empty where not needed."""
    *weight, a, b, gain, h, s, scaling, dropout_p, seed, need_dx, need_ab, need_gain = args
    own, dy, s, da, db = backward_arguments(dy, *weight, a, b, s, scaling, dropout_p, seed, need_ab)
    x, gain = x.contiguous(), gain.contiguous()
    h = h.contiguous() if need_gain else None
    dx = x.new_empty(x.shape if need_dx else (0,))
    dgain = gain.new_empty(gain.shape if need_gain else (0,))
    packed = pack(
        torch.get_num_threads(), x, *own, s=s, dy=dy, dx=dx if need_dx else None, da=da if need_ab else None,
        db=db if need_ab else None, gain=gain, h=h, dgain=dgain if need_gain else None,
    )  # fmt: skip
    native.check(native.cpu().pk_cpu_lora_linear_backward(packed, 1))
    return dx, da, db, dgain


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "dora_linear": Backend("native", forward, _CPU, available=available, when=_when_forward, bind=bind),
    "dora_linear_normed": Backend("native", normed, _CPU, available=available, when=_when_forward),
    "dora_linear_backward": Backend("native", backward, _CPU, available=available, when=_when_backward),
}
