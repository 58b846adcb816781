"""The native CPU backend of dora_linear: lora_linear's kernels, which honour a gain of the columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...native import pointer
from ..lora_linear.native import backend, backward_arguments, forward_arguments, pack, put, refusal

_NO_RANK = "does not serve adapters of rank 0"


def _when_forward(x: Tensor, *args: Any) -> str | None:
    a, b, bias = args[9], args[10], args[13]
    return refusal(args[0], args[5], a, b, bias) or (None if a.shape[0] else _NO_RANK)


def _when_backward(dy: Tensor, x: Tensor, *args: Any) -> str | None:
    a, b = args[8:10]
    return refusal(args[0], args[5], a, b, None) or (None if a.shape[0] else _NO_RANK)


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


# ---- a prepared step of training (`prepared.py`) --------------------------------------------------------------------
def _whole(count: int) -> int:
    """count float32 numbers rounded up to whole cache lines."""
    return (count + 15) & -16


def parts_of(left: Tensor, m: int, r: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(s [M, r], gain [N], norm [N]) of what `step` leaves, each from a whole cache line on."""
    gain, norm = _whole(m * r), _whole(m * r) + _whole(n)
    return left[: m * r].view(m, r), left[gain : gain + n], left[norm:]


def step(
    packed: tuple[bytes, ...], x: Tensor, n: int, r: int, magnitude: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y [M, N], s with the gain and the norm in one tensor, h [M, N] where the magnitude is trained) of
    `dora_linear_normed`. packed: `lora_linear.native.fields`; x [M, K] contiguous."""
    m = x.shape[0]
    at_gain = _whole(m * r)
    at_norm = at_gain + _whole(n)
    y, left = x.new_empty((m, n)), x.new_empty(at_norm + n, dtype=torch.float32)
    h = x.new_empty((m, n)) if magnitude.requires_grad else None
    s = left.data_ptr()
    gain = s + 4 * at_gain
    args = put(packed, x, seed, m, y.data_ptr(), s, gain=gain, h=0 if h is None else h.data_ptr())
    code = native.cpu().pk_cpu_dora_linear(args, magnitude.data_ptr(), gain, s + 4 * at_norm)
    if code:
        native.check(code)
    return y, left, h


def step_backward(
    packed: tuple[bytes, ...], dy: Tensor, x: Tensor, left: Tensor, h: Tensor | None, seed: Tensor | None, a: Tensor,
    b: Tensor, magnitude: Tensor, need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx [M, K], da [r, K], db [N, r], dm [N]); None where `need` says so."""
    need_dx, need_a, need_b, need_m = need[:4]
    dy = dy.contiguous()
    m, n = dy.shape
    dx, da, db = torch.empty_like(x) if need_dx else None, None, None
    if need_a or need_b:
        da, db = torch.empty_like(a), torch.empty_like(b)
    dm = torch.empty_like(magnitude) if need_m else None
    s = left.data_ptr()
    gain = s + 4 * _whole(m * a.shape[0])
    args = put(packed, x, seed, m, 0, s, dy.data_ptr(), pointer(dx), pointer(da), pointer(db), gain,
               0 if dm is None else pointer(h), pointer(dm))  # fmt: skip
    library = native.cpu()
    if dm is None:
        code = library.pk_cpu_lora_linear_backward(args, 1)
    else:
        code = library.pk_cpu_dora_linear_backward(args, gain + 4 * _whole(n))
    if code:
        native.check(code)
    return dx, da if need_a else None, db if need_b else None, dm


BACKENDS: dict[str, Backend] = {
    "dora_linear": backend(forward, _when_forward),
    "dora_linear_normed": backend(normed, _when_forward),
    "dora_linear_backward": backend(backward, _when_backward),
}
