"""Launches that a search for launch parameters times (`fastpeft tune`)."""

from __future__ import annotations

import torch


def unusable(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None where they can. Raises ImportError where Triton is missing."""
    from .triton_lib import host

    return host.missing() or host.wrong_mode(torch.empty(0, device=device))


def launch_lora_linear(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, blocksize: int, dropout_p: float, device: torch.device
) -> None:
    """One forward and one backward of `lora_linear` over a 4-bit weight [n, k] and m rows, by the Triton backend."""
    from .ops.lora_linear import triton as backend
    from .testing import random_quant_weight

    weight = random_quant_weight(n, k, blocksize=blocksize, nested=True).to(device).flatten()
    x, dy = (torch.randn(m, size, device=device, dtype=dtype) for size in (k, n))
    a, b = torch.randn(r, k, device=device), torch.randn(n, r, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    _, s = backend.forward(x, *weight, n, a, b, 1.0, None, dropout_p, seed)
    backend.backward(dy, x, *weight, a, b, s, 1.0, dropout_p, seed, True, True)
