"""The native CPU backend of swiglu."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    h = torch.empty_like(gate)
    native.check(native.cpu().pk_cpu_swiglu(gate.data_ptr(), up.data_ptr(), native.DTYPES[gate.dtype], gate.numel(),
                                            h.data_ptr(), torch.get_num_threads()))  # fmt: skip
    return h


def backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    gate, up, dh = gate.contiguous(), up.contiguous(), dh.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    native.check(native.cpu().pk_cpu_swiglu_backward(
        dh.data_ptr(), gate.data_ptr(), up.data_ptr(), native.DTYPES[gate.dtype], gate.numel(), dgate.data_ptr(),
        dup.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return dgate, dup


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "swiglu": Backend("native", forward, _CPU, available=native.available),
    "swiglu_backward": Backend("native", backward, _CPU, available=native.available),
}
