"""The native CPU backend of gated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...strides import row_stride, with_rows
from . import FUSED, new_gradients


class _Laid(NamedTuple):
    """gate and up as the kernels take them: their addresses, the distances of their rows, that of their elements.

    kept: the tensors that the addresses are of.
    """

    gate: int
    up: int
    strides: tuple[int, int, int]
    kept: tuple[Tensor, ...]


def _laid(gate: Tensor, up: Tensor | None) -> _Laid:
    if up is None:
        gate, row = with_rows(gate)
        return _Laid(gate.data_ptr(), 0, (row, 0, 1), (gate,))
    if gate.stride() == up.stride() and up.data_ptr() - gate.data_ptr() == gate.element_size():
        rows, n = _sizes(gate)
        if n > 1 and rows and (found := row_stride(gate, 2)) is not None:  # they alternate
            both = gate.as_strided((rows, 2 * n), (found, 1))
            return _Laid(both.data_ptr(), both.data_ptr() + both.element_size(), (found, found, 2), (both,))
    (gate, row), (up, up_row) = with_rows(gate), with_rows(up)
    return _Laid(gate.data_ptr(), up.data_ptr(), (row, up_row, 1), (gate, up))


def _sizes(t: Tensor) -> tuple[int, int]:
    n = t.shape[-1] if t.dim() else 1
    return (t.numel() // n if n else 0), n


def forward(gate: Tensor, up: Tensor | None, act: int, alpha: float, limit: float, shift: float) -> Tensor:
    """act(gate) * up."""
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if not h.numel():
        return h  # whose parts have no addresses
    laid = _laid(gate, up)
    native.check(native.cpu().pk_cpu_gated(
        laid.gate, laid.up, native.DTYPES[gate.dtype], *_sizes(gate), *laid.strides, act, alpha, limit, shift,
        h.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return h


def backward(
    gate: Tensor, up: Tensor | None, dh: Tensor, act: int, alpha: float, limit: float, shift: float, fused: int
) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    first, second, *_ = new_gradients(gate, up, fused)
    if not dh.numel():
        return first, second
    laid, dh = _laid(gate, up), dh.contiguous()
    rows, n = _sizes(gate)
    step = 2 if fused == FUSED["pairs"] else 1
    if fused:
        dup = first.data_ptr() + first.element_size() * (1 if step == 2 else n)
    else:
        dup = 0 if up is None else second.data_ptr()
    native.check(native.cpu().pk_cpu_gated_backward(
        dh.data_ptr(), laid.gate, laid.up, native.DTYPES[gate.dtype], rows, n, *laid.strides, 2 * n if fused else n,
        step, act, alpha, limit, shift, first.data_ptr(), dup, torch.get_num_threads(),
    ))  # fmt: skip
    return first, second


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "gated": Backend("native", forward, _CPU, available=native.available),
    "gated_backward": Backend("native", backward, _CPU, available=native.available),
}
