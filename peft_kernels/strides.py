"""Tensors as kernels take them without a copy: rows at one distance from each other, or at two."""

from __future__ import annotations

from torch import Tensor


def _levels(t: Tensor, step: int) -> list[tuple[int, int]] | None:
    """(how many, how far apart) of the rows of `t` [..., N], the innermost first, leading dimensions that follow each
    other as one. None where the elements of a row are not `step` apart."""
    if t.shape[-1] > 1 and t.stride(-1) != step:
        return None
    found: list[tuple[int, int]] = []
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if found and stride == found[-1][0] * found[-1][1]:
            found[-1] = found[-1][0] * size, found[-1][1]
        else:
            found.append((size, stride))
    return found


def row_stride(t: Tensor, step: int = 1) -> int | None:
    """The distance in elements between rows of `t` [..., N], whose elements are `step` apart; None where it has no one.

    A slice of the features of a wider tensor has one.
    """
    if step == 1 and t.is_contiguous():
        return t.shape[-1] if t.dim() else 1
    found = _levels(t, step) if t.dim() else None
    if found is None or len(found) > 1:
        return None
    return found[0][1] if found else t.shape[-1] * step


def with_rows(t: Tensor, step: int = 1) -> tuple[Tensor, int]:
    """`t`, or a contiguous copy where its rows have no one distance, and that distance."""
    stride = row_stride(t, step)
    return (t, stride) if stride is not None else (t.contiguous(), t.shape[-1] if t.dim() else 1)


def with_heads(t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`t` [..., N] and how its rows lie, or a contiguous copy where that has more than two distances.

    (how many rows follow each other at the first distance, that, the distance of such groups): heads of a slice of the
    features of a wider tensor.
    """
    if not t.is_contiguous():
        found = _levels(t, 1)
        if found is None or len(found) > 2:
            t = t.contiguous()
        elif found:
            (inner, inner_row), (_, outer_row) = found if len(found) == 2 else (found[0], (1, 0))
            return t, (inner, inner_row, outer_row)
    n = t.shape[-1]
    return t, (t.numel() // n or 1, n, 0)
