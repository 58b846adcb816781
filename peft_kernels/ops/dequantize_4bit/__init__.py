"""dequantize_4bit: NF4 or FP4 bytes back to floats, nested scales decoded on the way.

The value is the float32 product `table[code] * absmax`, rounded once more where the output is narrower than float32;
`absmax` of a nested weight is `nested_code[code] * nested_absmax + offset`, product and sum each rounded to float32.
Every backend gives these bits. They are also bitsandbytes' wherever its CPU kernel is right: with AVX-512, that one
starts a new block at each row, so it reads wrong scales when the last dimension is not a multiple of the blocksize.
Format: `formats.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import Op, arg_error
from ...formats import BLOCKSIZES, QUANT_NAMES, QuantWeight, decode_4bit

OUT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def numel_of(shape: tuple[int, ...] | torch.Size) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def refuse_dtype(*args: object) -> str | None:
    """`Backend.when` of every kernel: they write the three dtypes of OUT_DTYPES."""
    return None if args[9] in OUT_DTYPES else f"does not write {args[9]}"


def _check(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> None:  # fmt: skip
    def fail(arg: str, expected: str, got: object, error: type[Exception] = ValueError) -> Exception:
        return arg_error("dequantize_4bit", arg, expected, got, error)

    if packed.dtype is not torch.uint8:
        raise fail("packed", "uint8", packed.dtype, TypeError)
    if quant_type not in QUANT_NAMES:
        raise fail("quant_type", f"one of {QUANT_NAMES}", quant_type)
    if blocksize not in BLOCKSIZES:
        raise fail("blocksize", f"one of {BLOCKSIZES}", blocksize)
    if not dtype.is_floating_point:
        raise fail("dtype", "a floating-point dtype", dtype, TypeError)
    numel = numel_of(shape)
    if packed.numel() != (numel + 1) // 2:
        raise fail("packed", f"{(numel + 1) // 2} bytes for shape {tuple(shape)}", packed.numel())
    nblocks = -(-numel // blocksize)
    if absmax.numel() != nblocks:
        raise fail("absmax", f"{nblocks} scales for shape {tuple(shape)} at blocksize {blocksize}", absmax.numel())
    parts = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_code": nested_code, "offset": offset}
    for name, t in parts.items():
        if t is not None and t.device != packed.device:
            raise fail(name, f"on {packed.device} like packed", t.device)
    if nested_absmax is None:
        if absmax.dtype is not torch.float32:
            raise fail("absmax", "float32 when it is not nested", absmax.dtype, TypeError)
        return
    if absmax.dtype is not torch.uint8:
        raise fail("absmax", "uint8 codes when nested", absmax.dtype, TypeError)
    if nested_blocksize < 1:
        raise fail("nested_blocksize", "positive", nested_blocksize)
    sizes = {"nested_absmax": -(-nblocks // nested_blocksize), "nested_code": 256, "offset": 1}
    for name, size in sizes.items():
        t = parts[name]
        if t is None or t.numel() != size:
            raise fail(name, f"{size} float32 values", "None" if t is None else f"{t.numel()}")
        if t.dtype is not torch.float32:
            raise fail(name, "float32", t.dtype, TypeError)


def _fake(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty(shape, dtype=dtype)


def _reference(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None,
    quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return decode_4bit(
        packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, tuple(shape)
    ).to(dtype)


op = Op(
    name="dequantize_4bit",
    schema=(
        "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int quant_type, "
        "int blocksize, int nested_blocksize, SymInt[] shape, ScalarType dtype) -> Tensor"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
)


def dequantize_4bit(qw: QuantWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as a dense tensor of `qw.shape`, in `dtype` (default: the dtype it was quantised from).

    Raises ValueError or TypeError where the parts of `qw` do not fit together.
    """
    return op.op(*qw.flatten(), list(qw.shape), qw.dtype if dtype is None else dtype)
