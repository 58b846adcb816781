"""The native CPU backend of rms_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend

_CODES = {t: native.DTYPES[t] for t in (torch.float32, torch.bfloat16, torch.float16)}


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps)."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    native.check(native.cpu().pk_cpu_rms_norm(
        x.data_ptr(), weight.data_ptr(), _CODES[x.dtype], _CODES[weight.dtype], x.numel() // x.shape[-1], x.shape[-1],
        eps, y.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    native.check(native.cpu().pk_cpu_rms_norm_backward(
        dy.data_ptr(), x.data_ptr(), weight.data_ptr(), _CODES[x.dtype], _CODES[weight.dtype],
        x.numel() // x.shape[-1], x.shape[-1], eps, dx.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return dx


def _refusal(*args: Any) -> str | None:
    weight = args[-2]
    return None if weight.dtype in _CODES else f"weight is {weight.dtype}"


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "rms_norm": Backend("native", forward, _CPU, available=native.available, when=_refusal),
    "rms_norm_backward": Backend("native", backward, _CPU, available=native.available, when=_refusal),
}
