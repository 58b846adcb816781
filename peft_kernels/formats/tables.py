"""The tables of 4-bit codes: their values, each in one place, and the tensors of them on the devices in use."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import PLAIN, capturing

NF4_TABLE: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# sign, then a 2-bit exponent and one mantissa bit in bitsandbytes' own order, divided by the largest value, 12
# (+ 0.0: code 8 is +0.0, as in bitsandbytes, not -0.0)
FP4_TABLE: tuple[float, ...] = tuple(
    sign * v / 12.0 + 0.0 for sign in (1.0, -1.0) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)

# of llama.cpp's IQ4_NL, and the values of FP4 as the OCP's microscaling (MX) formats order them, doubled
IQ4_NL_TABLE: tuple[float, ...] = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
MXFP4_TABLE: tuple[float, ...] = tuple(
    sign * v + 0.0 for sign in (1.0, -1.0) for v in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
)

# 0 is a dense weight; the other numbers are those of `known`
QUANT_TYPES: dict[str, int] = {"nf4": 1, "fp4": 2}  # what `quantize_4bit` makes
QUANT_NAMES: dict[int, str] = {v: k for k, v in QUANT_TYPES.items()}
TABLES: dict[int, tuple[float, ...]] = {1: NF4_TABLE, 2: FP4_TABLE}
IQ4_NL, MXFP4 = 14, 15  # numbers of formats
_ALL: dict[int, tuple[float, ...]] = {**TABLES, IQ4_NL: IQ4_NL_TABLE, MXFP4: MXFP4_TABLE}
HAVE_TABLE = frozenset(_ALL)  # numbers of the formats whose codes have one

_tables: dict[torch.device, dict[int, tuple[Tensor, Tensor]]] = {}


def _make(device: torch.device | str) -> dict[int, tuple[Tensor, Tensor]]:
    made = {}
    with torch.inference_mode(False):
        for quant_type, entries in _ALL.items():
            values = torch.tensor(entries, dtype=torch.float32, device="cpu")
            half = values.half()
            pairs = torch.stack((half.repeat_interleave(16), half.repeat(16)), dim=1).view(torch.int32).reshape(256)
            made[quant_type] = values.to(device), pairs.to(device)
    return made


def make_tables(like: Tensor) -> None:
    """Makes the code tables on the device of `like`, once; they stay. Called where a weight is made or moved.

    Operators make none: what a call leaves behind would be lost with the memory of a CUDA graph, and a copy to the
    device cannot be captured in one.
    """
    if torch.compiler.is_compiling():  # first, or the tables become part of what is traced
        return
    device = like.device
    if device in _tables or device.type == "meta" or type(like) not in PLAIN:
        return
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or capturing():
        return  # fake tensors are no tables
    _tables[device] = _make(device)


def _found(quant_type: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    device = torch.device(device)
    known = _tables.get(device)
    if known is None:
        if capturing():
            raise RuntimeError(
                f"the tables of 4-bit codes are not on {device}, and cannot be copied there while a CUDA graph is "
                "captured: make the QuantWeight, or call its .to(device), before"
            )
        known = _make(device)  # of tensors that never were a QuantWeight there: for this call alone
    return known[quant_type]


def table(quant_type: int, device: torch.device | str = "cpu") -> Tensor:
    """The 16 float32 values of a code table on `device` (do not write to it)."""
    return _found(quant_type, device)[0]


def pair_table(quant_type: int, device: torch.device | str) -> Tensor:
    """int32 [256]: the two values of a byte as float16, that of the high nibble (even element) in the low half."""
    return _found(quant_type, device)[1]


make_tables(torch.empty(0, device="cpu"))
