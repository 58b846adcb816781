"""Matrices transposed by the native CPU library."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native


def transpose(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Write each source transposed into its `to`; False, and nothing is written, where the library cannot serve all."""
    dtype = pairs[0][0].dtype
    if dtype.itemsize not in (2, 4) or native.available() is not None:
        return False
    numbers: list[int] = []
    for to, source in pairs:
        rows, cols = source.shape
        plain = (
            to.shape == (cols, rows) and to.dtype is source.dtype is dtype and to.device.type == "cpu"
            and source.device.type == "cpu" and to.layout is source.layout is torch.strided
            and _by_rows(to) and _by_rows(source) and not (source.is_neg() or source.is_conj() or to.is_neg())
        )  # fmt: skip
        if not plain:
            return False
        numbers += (source.data_ptr(), to.data_ptr(), rows, cols, _step(source), _step(to))
    packed = struct.pack(f"={len(numbers)}q", *numbers)
    native.check(native.cpu().pk_cpu_transpose(packed, len(pairs), dtype.itemsize, torch.get_num_threads()))
    return True


def _by_rows(t: Tensor) -> bool:
    """Whether a row's elements follow one another, and rows do not overlap."""
    return t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1])


def _step(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else max(t.shape[1], 1)
