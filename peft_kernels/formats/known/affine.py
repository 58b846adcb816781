"""Integers by group with scales: GPTQ (with and without act-order), AWQ, HQQ, torchao's int4 and int8, int8 rows.

    value = (code - zero) * scale + shift

in float32, difference, product and sum each rounded once. Groups are of `blocksize` columns of a row; a row of K
columns has G = ceil(K / blocksize) of them, and scales, zeros and shifts are [rows, G].

- packed: codes in row-major order, flat over the rows. "int4": 0 .. 15, two a byte, the high nibble holding the even
  element. "int8": -128 .. 127 and "uint8": 0 .. 255, one a byte.
- absmax: the scales, float32, float16 or bfloat16.
- nested_absmax: the zeros, uint8 or of the scales' dtype. None: 8 for "int4", 0 for "int8", 128 for "uint8".
- nested_code: int32 [K], the group of each column (GPTQ's `g_idx`); None: column // blocksize.
- offset: the shifts, of the scales' dtype; None: no sum is taken.

The packings of int32 words that GPTQ and AWQ write are turned into this form once, at load (`makers.py`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...checks import arg_error
from ..by_group import to_hqq, to_int8
from ..format import Format, Parts, Shape, ceil_div, check_size, nibbles, not_finite, rows_of

SCALES = (torch.float32, torch.float16, torch.bfloat16)
ZEROS = {"int4": 8, "int8": 0, "uint8": 128}  # where there are none


def groups_of(shape: Shape, blocksize: int) -> int:
    """Groups of a row."""
    return ceil_div(rows_of(shape)[1], blocksize)


def _check(
    of: str, op: str, packed: Tensor, scales: Tensor | None, zeros: Tensor | None, index: Tensor | None,
    shifts: Tensor | None, blocksize: int, _: int, shape: Shape, name: str,
) -> None:  # fmt: skip
    if blocksize < 1:
        raise arg_error(op, "blocksize", "at least 1", blocksize)
    rows, columns = rows_of(shape)
    groups, numel = groups_of(shape, blocksize), rows * columns
    check_size(op, name, packed, (numel + 1) // 2 if of == "int4" else numel, f"bytes for {of} of shape {tuple(shape)}")
    text = f"values for shape {tuple(shape)} in groups of {blocksize}"
    scales = check_size(op, "absmax", scales, rows * groups, f"scales, {text}")
    if scales.dtype not in SCALES:
        raise arg_error(op, "absmax", f"scales of one of {SCALES}", scales.dtype, TypeError)
    if zeros is not None:
        check_size(op, "nested_absmax", zeros, rows * groups, f"zeros, {text}")
        if zeros.dtype not in (torch.uint8, scales.dtype):
            raise arg_error(op, "nested_absmax", f"zeros of uint8 or {scales.dtype}", zeros.dtype, TypeError)
    if shifts is not None:
        check_size(op, "offset", shifts, rows * groups, f"shifts, {text}")
        if shifts.dtype is not scales.dtype:
            raise arg_error(op, "offset", f"shifts of {scales.dtype} like the scales", shifts.dtype, TypeError)
    if index is not None:
        check_size(op, "nested_code", index, columns, f"groups, one a column of shape {tuple(shape)}")
        if index.dtype is not torch.int32:
            raise arg_error(op, "nested_code", "int32 groups of columns", index.dtype, TypeError)


def _decode(of: str, parts: Parts, shape: Shape) -> Tensor:
    packed, scales, zeros, index, shifts, blocksize, _ = parts
    assert scales is not None
    rows, columns = rows_of(shape)
    groups = groups_of(shape, blocksize)
    if of == "int4":
        codes = nibbles(packed)[: rows * columns]
    else:
        codes = packed.reshape(-1).view(torch.int8) if of == "int8" else packed.reshape(-1)
    which = index.reshape(-1).long() if index is not None else (
        torch.arange(columns, device=packed.device) // blocksize
    )  # fmt: skip

    def spread(t: Tensor) -> Tensor:
        return t.reshape(rows, groups).to(torch.float32)[:, which]

    value = codes.reshape(rows, columns).to(torch.float32)
    if zeros is not None:
        value = value - spread(zeros)
    elif ZEROS[of]:
        value = value - ZEROS[of]
    value = value * spread(scales)
    if shifts is not None:
        value = value + spread(shifts)
    return value.reshape(tuple(shape))


def _wrong(parts: Parts, shape: Shape) -> str | None:
    index, groups = parts.nested_code, groups_of(shape, parts.blocksize)
    if index is not None and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups:
            return f"the index of groups (g_idx) is {low} to {high}, and there are {groups} groups"
    return not_finite(scales=parts.absmax, zeros=parts.nested_absmax, shifts=parts.offset)


FORMATS = [
    Format("int4", 3, partial(_check, "int4"), partial(_decode, "int4"), _wrong, partial(to_hqq, 4)),
    Format("int8", 4, partial(_check, "int8"), partial(_decode, "int8"), _wrong, to_int8),
    Format("uint8", 5, partial(_check, "uint8"), partial(_decode, "uint8"), _wrong, partial(to_hqq, 8)),
]
