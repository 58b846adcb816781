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
    """gate and up as the kernels take them: their addresses, rows, features, the distances of rows and of elements.

    kept: the tensors that the addresses are of.
    """

    gate: int
    up: int
    sizes: tuple[int, int]
    strides: tuple[int, int, int]
    kept: tuple[Tensor, ...]


def _laid(gate: Tensor, up: Tensor | None, flat: bool = False) -> _Laid:
    """flat: what follows each other is one row."""
    if flat and gate.is_contiguous() and (up is None or up.is_contiguous()):  # the common case, at a third of the time
        n = gate.numel()
        return _Laid(gate.data_ptr(), 0 if up is None else up.data_ptr(), (1, n), (n, n, 1), ())
    n = gate.shape[-1] if gate.dim() else 1
    sizes = gate.numel() // n, n
    if up is None:
        gate, row = with_rows(gate)
        return _Laid(gate.data_ptr(), 0, sizes, (row, 0, 1), (gate,))
    alternate = gate.stride() == up.stride() and up.data_ptr() - gate.data_ptr() == gate.element_size()
    if alternate and n > 1 and (found := row_stride(gate, 2)) is not None:
        both = gate.as_strided((sizes[0], 2 * n), (found, 1))
        return _Laid(both.data_ptr(), both.data_ptr() + both.element_size(), sizes, (found, found, 2), (both,))
    (gate, row), (up, up_row) = with_rows(gate), with_rows(up)
    return _Laid(gate.data_ptr(), up.data_ptr(), sizes, (row, up_row, 1), (gate, up))


def forward(gate: Tensor, up: Tensor | None, act: int, alpha: float, limit: float, shift: float) -> Tensor:
    """act(gate) * up."""
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if not h.numel():
        return h  # whose parts have no addresses
    at, up_at, sizes, strides, _kept = _laid(gate, up, True)
    native.check(native.cpu().pk_cpu_gated(
        at, up_at, native.DTYPES[gate.dtype], *sizes, *strides, act, alpha, limit, shift, h.data_ptr(),
        torch.get_num_threads(),
    ))  # fmt: skip
    return h


def row(y: Tensor, n: int, up: int, act: int, alpha: float, limit: float, shift: float) -> Tensor:
    """`forward` [1, n] of one row, y contiguous, that begins with gate. up: the element of y where up begins; 1: the
    two alternate; 0: there is none."""
    h, at, step = y.new_empty((1, n)), y.data_ptr(), 2 if up == 1 else 1
    code = native.cpu().pk_cpu_gated(
        at, up and at + up * y.element_size(), native.DTYPES[y.dtype], 1, n, step * n, step * n, step, act, alpha,
        limit, shift, h.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if code:
        native.check(code)
    return h


def backward(
    gate: Tensor, up: Tensor | None, dh: Tensor, act: int, alpha: float, limit: float, shift: float, fused: int
) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    first, second, *_ = new_gradients(gate, up, fused)
    if not dh.numel():
        return first, second
    at, up_at, (rows, n), strides, _kept = _laid(gate, up, not fused)
    dh = dh.contiguous()
    step = 2 if fused == FUSED["pairs"] else 1
    if fused:
        dup = first.data_ptr() + first.element_size() * (1 if step == 2 else n)
    else:
        dup = 0 if up is None else second.data_ptr()
    native.check(native.cpu().pk_cpu_gated_backward(
        dh.data_ptr(), at, up_at, native.DTYPES[gate.dtype], rows, n, *strides, 2 * n if fused else n, step, act, alpha,
        limit, shift, first.data_ptr(), dup, torch.get_num_threads(),
    ))  # fmt: skip
    return first, second


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "gated": Backend("native", forward, _CPU, available=native.available),
    "gated_backward": Backend("native", backward, _CPU, available=native.available),
}
