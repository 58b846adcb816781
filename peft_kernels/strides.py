"""Tensors as kernels take them without a copy: rows at one distance from each other."""

from __future__ import annotations

from torch import Tensor


def row_stride(t: Tensor, step: int = 1) -> int | None:
    """The distance in elements between rows of `t` [..., N], whose elements are `step` apart; None where it has no one.

    A slice of the features of a wider tensor has one: leading dimensions that follow each other count as one.
    """
    if step == 1 and t.is_contiguous():
        return t.shape[-1] if t.dim() else 1
    if t.dim() == 0 or (t.shape[-1] > 1 and t.stride(-1) != step):
        return None
    sizes, strides = t.shape[:-1], t.stride()[:-1]
    found, rows = None, 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if found is None:
            found = stride
        elif stride != found * rows:
            return None
        rows *= size
    return t.shape[-1] * step if found is None else found


def with_rows(t: Tensor, step: int = 1) -> tuple[Tensor, int]:
    """`t`, or a contiguous copy where its rows have no one distance, and that distance."""
    stride = row_stride(t, step)
    return (t, stride) if stride is not None else (t.contiguous(), t.shape[-1] if t.dim() else 1)
