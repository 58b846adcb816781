"""Triton backend of swiglu: the host side. Bound by memory: three reads or writes forward, five backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_lib import host

BLOCK = 2048  # elements a program


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    from .triton_kernels import forward_kernel

    gate, up = gate.contiguous(), up.contiguous()
    h, numel = torch.empty_like(gate), gate.numel()
    host.launch(forward_kernel, (-(-numel // BLOCK),), gate, up, h, numel, BLOCK=BLOCK, num_warps=4, num_stages=1)
    return h


def backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    from .triton_kernels import backward_kernel

    gate, up, dh = gate.contiguous(), up.contiguous(), dh.contiguous()
    dgate, dup, numel = torch.empty_like(gate), torch.empty_like(gate), gate.numel()
    host.launch(backward_kernel, (-(-numel // BLOCK),), gate, up, dh, dgate, dup, numel, BLOCK=BLOCK, num_warps=4,
                num_stages=1)  # fmt: skip
    return dgate, dup


BACKENDS = host.backends({"swiglu": forward, "swiglu_backward": backward})
