"""The formats there are, by name and by number, and what is asked of a weight of any of them."""

from __future__ import annotations

import importlib
import pkgutil

import torch
from torch import Tensor

from ..checks import arg_error
from . import known
from .format import Format, Parts, Shape

FORMATS: dict[str, Format] = {}
NUMBERS: dict[int, Format] = {}


def _find() -> None:
    for module in sorted(m.name for m in pkgutil.iter_modules(known.__path__)):
        for found in importlib.import_module(f"{known.__name__}.{module}").FORMATS:
            assert found.name not in FORMATS, found.name
            assert found.number not in NUMBERS, found.number
            FORMATS[found.name] = NUMBERS[found.number] = found


def format_of(op: str, quant_type: int) -> Format:
    """The format of a number. ValueError where there is none."""
    found = NUMBERS.get(quant_type)
    if found is None:
        raise arg_error(op, "quant_type", f"one of {dict(sorted((n, f.name) for n, f in NUMBERS.items()))}", quant_type)
    return found


def decode_4bit(
    packed: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    quant_type: int,
    blocksize: int,
    nested_blocksize: int,
    shape: Shape,
) -> Tensor:
    """The exact decode of any format: a float32 tensor of `shape`. Plain torch on any device."""
    parts = Parts(packed, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
    return format_of("decode_4bit", quant_type).decode(parts, shape)


def check_parts(
    op: str, packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, shape: Shape, name: str = "packed",
) -> None:  # fmt: skip
    """Raise ValueError or TypeError unless the parts of a weight of `shape` have the dtypes and sizes that are read of
    them. name: what the caller calls `packed`. Devices and memory are every operator's (`checks.Operands`)."""
    if packed.dtype is not torch.uint8:
        raise arg_error(op, name, "uint8", packed.dtype, TypeError)
    found = format_of(op, quant_type)
    if any(n < 0 for n in shape):
        raise arg_error(op, "shape", "of sizes of 0 or more", tuple(shape))
    found.check(op, Parts(packed, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize), shape, name)


_find()
