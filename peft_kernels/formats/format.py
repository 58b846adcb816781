"""A format of quantised weights: its name and number, its parts, the check of them, and their exact decode.

Operators carry a weight as eight fields (`Parts` and the number), whatever its format; each says what they hold. A
format is a `Format` in a module of `known`, which is found by being there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import arg_error

FlatWeight = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, int]
Shape = tuple[int, ...] | torch.Size


class Parts(NamedTuple):
    """A weight's tensors and sizes in the order of schemas, without the number of its format.

    | | NF4, FP4 | affine | GGUF |
    |---|---|---|---|
    | packed | uint8: codes | uint8: codes | uint8: blocks as they lie in the file |
    | absmax | scales, or their codes | scales | |
    | nested_absmax | scales of the codes | zeros | |
    | nested_code | values of the codes | group of each column | |
    | offset | added to scales | added to values | |
    | blocksize | elements a scale | columns a group | elements a block |
    """

    packed: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    blocksize: int
    nested_blocksize: int


@dataclass(frozen=True)
class Format:
    """A format of quantised weights.

    name: of `QuantWeight.quant_type`. number: `quant_type` of schemas and of the native libraries.
    check(op, *parts, shape, name): an error (`checks.arg_error`) unless the parts have the dtypes and sizes that a
    weight of `shape` has; name: what the caller calls `packed`. It reads no values, and runs before every call.
    decode(parts, shape): the weight by the format's definition, float32, plain torch: the oracle of every kernel.
    wrong(parts, shape): the reason why these values are no weight's, a scale that is not finite for one; None where
    there is none. It reads all scales, so it is for when a weight is made or loaded.
    quantize(w, blocksize): the parts for w, of any floating dtype and finite, with the bits of the owner's code;
    blocksize None: what the owner takes. Absent where only the owner's files hold such weights.
    blocksize: of a weight, where it cannot be another. block_bytes: of a block with its scales inside.
    halves: the bytes of a block where a float16 begins.
    """

    name: str
    number: int
    check: Callable[..., None]
    decode: Callable[[Parts, Shape], Tensor]
    wrong: Callable[[Parts, Shape], str | None]
    quantize: Callable[[Tensor, int | None], Parts] | None = None
    blocksize: int | None = None
    block_bytes: int | None = None
    halves: tuple[int, ...] = ()


def check_absent(op: str, of: str, **parts: Tensor | None) -> None:
    """ValueError where there is a part that the format `of` does not have."""
    for name, t in parts.items():
        if t is not None:
            raise arg_error(op, name, f"None for {of}", tuple(t.shape))


def check_size(op: str, name: str, t: Tensor | None, size: int, of: str) -> Tensor:
    """`t`; ValueError unless it has `size` elements, which the message calls `of`."""
    if t is None or t.numel() != size:
        raise arg_error(op, name, f"{size} {of}", "None" if t is None else t.numel())
    return t


def not_finite(**tensors: Tensor | None) -> str | None:
    """The reason of `Format.wrong` where one has values that are not finite; None elsewhere."""
    for name, t in tensors.items():
        if t is not None and t.is_floating_point() and not bool(t.isfinite().all()):
            return f"{name} holds {int((~t.isfinite()).sum())} values that are not finite"
    return None


def rows_of(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a weight whose groups or blocks are of columns of a row."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows, of about 2^20 elements each: what is made of one at a time stays small."""
    step = max(1, (1 << 20) // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, first + step)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def nibbles(packed: Tensor) -> Tensor:
    """uint8 codes of flat bytes, that of the high nibble (the even element) first."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 15), dim=1).reshape(-1)
