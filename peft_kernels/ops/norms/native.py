"""The native CPU backend of rms_norm and layer_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...strides import with_heads
from . import new_gradients

_CODES = {t: native.DTYPES[t] for t in (torch.float32, torch.bfloat16, torch.float16)}


def _norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, bias: Tensor | None = None, centred: bool = False
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x, (inner, inner_row, outer_row)), n = with_heads(x), x.shape[-1]
    w = b = code = 0
    if weight is not None:
        weight = weight.contiguous()
        w, code = weight.data_ptr(), _CODES[weight.dtype]
    if bias is not None:
        bias = bias.contiguous()
        b, code = bias.data_ptr(), _CODES[bias.dtype]
    native.check(native.cpu().pk_cpu_norm(
        x.data_ptr(), w, b, _CODES[x.dtype], code, x.numel() // n, n, inner, inner_row, outer_row, centred, eps, offset,
        y.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return y


# ---- prepared calls -------------------------------------------------------------------------------------------------
def fields(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    """The arguments of `pk_cpu_norm` that stay from call to call: addresses of weight and bias, codes of dtypes."""
    factor = weight if bias is None else bias
    code = 0 if factor is None else _CODES[factor.dtype]
    return native.pointer(weight), native.pointer(bias), _CODES[x.dtype], code


def step(x: Tensor, n: int, packed: tuple[int, ...], numbers: tuple[bool, float, float]) -> Tensor:
    """y of x [..., N], contiguous. numbers: centred, eps and offset."""
    y, rows = torch.empty_like(x), x.numel() // n
    code = native.cpu().pk_cpu_norm(x.data_ptr(), *packed, rows, n, rows or 1, n, 0, *numbers, y.data_ptr(),
                                    torch.get_num_threads())  # fmt: skip
    if code:
        native.check(code)
    return y


def step_backward(dy: Tensor, x: Tensor, n: int, packed: tuple[int, ...], numbers: tuple[bool, float, float]) -> Tensor:
    """dx of `step`, where weight and bias are frozen."""
    dy, dx, rows = dy.contiguous(), torch.empty_like(x), x.numel() // n
    weight, _, *codes = packed
    code = native.cpu().pk_cpu_norm_backward(
        dy.data_ptr(), x.data_ptr(), weight, *codes, rows, n, rows or 1, n, 0, *numbers, dx.data_ptr(), 0, 0,
        torch.get_num_threads(),
    )  # fmt: skip
    if code:
        native.check(code)
    return dx


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, need_dx: bool, need_sums: bool,
    centred: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    found, n = new_gradients(x, need_dx, need_sums, centred), x.shape[-1]
    dy, (x, (inner, inner_row, outer_row)) = dy.contiguous(), with_heads(x)
    w = code = dweight = dbias = 0
    if weight is not None:
        weight = weight.contiguous()
        w, code = weight.data_ptr(), _CODES[weight.dtype]
    if need_sums:
        dweight, dbias = found[1].data_ptr(), found[2].data_ptr() if centred else 0
    native.check(native.cpu().pk_cpu_norm_backward(
        dy.data_ptr(), x.data_ptr(), w, _CODES[x.dtype], code, x.numel() // n, n, inner, inner_row, outer_row, centred,
        eps, offset, found[0].data_ptr() if need_dx else 0, dweight, dbias, torch.get_num_threads(),
    ))  # fmt: skip
    return found


def _refusal(weight: Tensor | None, bias: Tensor | None = None) -> str | None:
    if weight is not None and weight.dtype not in _CODES:
        return f"weight is {weight.dtype}"
    if bias is None:
        return None
    if weight is not None and weight.dtype is not bias.dtype:
        return f"weight and bias are {weight.dtype} and {bias.dtype}"
    return None if bias.dtype in _CODES else f"bias is {bias.dtype}"


_CPU = frozenset({"cpu"})


def _backend(fn: Any, when: Any) -> Backend:
    return Backend("native", fn, _CPU, available=native.available, when=when)


BACKENDS: dict[str, Backend] = {
    "rms_norm": _backend(_norm, lambda x, weight, *_: _refusal(weight)),
    "rms_norm_backward": _backend(_gradients, lambda dy, x, weight, *_: _refusal(weight)),
    "layer_norm": _backend(
        lambda x, weight, bias, eps: _norm(x, weight, eps, 0.0, bias, True),
        lambda x, weight, bias, *_: _refusal(weight, bias),
    ),
    "layer_norm_backward": _backend(
        lambda dy, x, weight, eps, *need: _gradients(dy, x, weight, eps, 0.0, *need, True),
        lambda dy, x, weight, *_: _refusal(weight),
    ),
}
