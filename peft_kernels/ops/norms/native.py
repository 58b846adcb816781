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


def _address(t: Tensor | None) -> int:
    return 0 if t is None or not t.numel() else t.data_ptr()


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x, strides), n = with_heads(x), x.shape[-1]
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    factor = bias if weight is None else weight
    code = 0 if factor is None else _CODES[factor.dtype]
    native.check(native.cpu().pk_cpu_norm(
        x.data_ptr(), _address(weight), _address(bias), _CODES[x.dtype], code, x.numel() // n, n, *strides, centred,
        eps, offset, y.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return y


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, need_dx: bool, need_sums: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found, n = new_gradients(x, need_dx, need_sums), x.shape[-1]
    dy, (x, strides), weight = dy.contiguous(), with_heads(x), None if weight is None else weight.contiguous()
    dx, dweight, dbias = map(_address, found)
    native.check(native.cpu().pk_cpu_norm_backward(
        dy.data_ptr(), x.data_ptr(), _address(weight), _CODES[x.dtype], 0 if weight is None else _CODES[weight.dtype],
        x.numel() // n, n, *strides, centred, eps, offset, dx, dweight, dbias if centred else 0,
        torch.get_num_threads(),
    ))  # fmt: skip
    return found


_CPU = frozenset({"cpu"})


def _backend(fn: Any, of: slice) -> Backend:
    """of: where the weight and the bias are among the arguments."""

    def refusal(*args: Any) -> str | None:
        first = None
        for t in args[of]:
            if t is None:
                continue
            if t.dtype not in _CODES:
                return f"weight is {t.dtype}"
            if first is not None and t.dtype is not first:
                return f"weight and bias are {first} and {t.dtype}"
            first = t.dtype
        return None

    return Backend("native", fn, _CPU, available=native.available, when=refusal)


BACKENDS: dict[str, Backend] = {
    "rms_norm": _backend(lambda x, weight, eps, offset: _norm(x, weight, None, eps, offset, False), slice(1, 2)),
    "rms_norm_backward": _backend(lambda *args: _gradients(*args, False)[:2], slice(2, 3)),
    "layer_norm": _backend(lambda x, weight, bias, eps: _norm(x, weight, bias, eps, 0.0, True), slice(1, 3)),
    "layer_norm_backward": _backend(
        lambda dy, x, weight, eps, *need: _gradients(dy, x, weight, eps, 0.0, *need, True), slice(2, 3)
    ),
}
