"""dequantize_4bit: a quantised weight of any format back to floats, nested scales decoded on the way.

The value of NF4 and FP4 is the float32 product `table[code] * absmax`; `absmax` of a nested weight is
`nested_code[code] * nested_absmax + offset`, product and sum each rounded to float32. That of the others is in
`formats/known`. It is rounded once more where the output is narrower than float32. Every backend gives these bits. They
are also bitsandbytes' wherever its CPU kernel is right: with AVX-512, that one starts a new block at each row, so it
reads wrong scales when the last dimension is not a multiple of the blocksize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import arg_error
from ...dispatch import Op
from ...formats import QuantWeight, check_parts, decode_4bit

OUT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def refuse_dtype(*args: object) -> str | None:
    """`Backend.when` of every kernel: they write the three dtypes of OUT_DTYPES."""
    return None if args[9] in OUT_DTYPES else f"does not write {args[9]}"


def _check(
    packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> None:  # fmt: skip
    check_parts("dequantize_4bit", packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                nested_blocksize, tuple(shape))  # fmt: skip
    if not dtype.is_floating_point:
        raise arg_error("dequantize_4bit", "dtype", "a floating-point dtype", dtype, TypeError)


def _fake(
    packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty(shape, dtype=dtype)


def _reference(
    packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return decode_4bit(
        packed, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, tuple(shape)
    ).to(dtype)


op = Op(
    name="dequantize_4bit",
    schema=(
        "(Tensor packed, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int quant_type, "
        "int blocksize, int nested_blocksize, SymInt[] shape, ScalarType dtype) -> Tensor"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="packed[N,K] shape[N,K]",
)


def dequantize_4bit(qw: QuantWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as a dense tensor of `qw.shape`, in `dtype` (default: the dtype it was quantised from).

    Raises ValueError or TypeError where the parts of `qw` do not fit together.
    """
    return op.op(*qw.flatten(), list(qw.shape), qw.dtype if dtype is None else dtype)
