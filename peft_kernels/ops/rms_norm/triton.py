"""Triton backend of rms_norm: the host side. A row a program; bound by memory: two passes forward, three backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, empty_like

from ...triton_lib import host

MOST = 16384  # features: a row lies in the registers of a program


def _options(n: int) -> dict[str, int]:
    block = 1 << (n - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 1024)), "num_stages": 1}


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps)."""
    from .triton_kernels import rms_norm_kernel

    x, weight = x.contiguous(), weight.contiguous()
    y, n = empty_like(x), x.shape[-1]
    host.launch(rms_norm_kernel, (x.numel() // n,), x, weight, y, n, eps, **_options(n))
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dx."""
    from .triton_kernels import rms_norm_backward_kernel

    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx, n = empty_like(x), x.shape[-1]
    host.launch(rms_norm_backward_kernel, (x.numel() // n,), dy, x, weight, dx, n, eps, **_options(n))
    return dx


def _refusal(x: Tensor, *args: Any) -> str | None:
    return f"rows of more than {MOST} features" if x.shape[-1] > MOST else host.wrong_mode(x)


BACKENDS = host.backends({"rms_norm": forward, "rms_norm_backward": backward}, _refusal)
