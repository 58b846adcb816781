"""How weights and adapters are stored: formats of quantised weights, and stacks of LoRA adapters.

A format is a file in `known`: what parts a weight has, and the exact decode, which is the oracle of every kernel.
`QuantWeight` holds the parts together; `makers` takes them from what other packages store.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .format import FlatWeight, Format, Parts
from .known.four_bit import BLOCKSIZES, decode_absmax
from .makers import from_awq, from_bnb_int8, from_gptq, from_hqq, from_torchao, pack_nibbles
from .registry import FORMATS, NUMBERS, check_parts, decode_4bit, format_of
from .stacks import AdapterStack
from .tables import (
    FP4_TABLE,
    HAVE_TABLE,
    NF4_TABLE,
    QUANT_NAMES,
    QUANT_TYPES,
    TABLES,
    make_tables,
    pair_table,
    table,
)
from .weight import QuantWeight

__all__ = [
    "BLOCKSIZES", "FORMATS", "FP4_TABLE", "HAVE_TABLE", "NF4_TABLE", "NUMBERS", "QUANT_NAMES", "QUANT_TYPES",
    "TABLES", "AdapterStack", "FlatWeight", "Format", "Parts", "QuantWeight", "check_parts", "contiguous",
    "decode_4bit", "decode_absmax", "format_of", "from_awq", "from_bnb_int8", "from_gptq", "from_hqq",
    "from_torchao", "make_tables", "pack_nibbles", "pair_table", "table",
]  # fmt: skip


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each as kernels read it; a tensor that is contiguous is not copied. Their list keeps copies alive."""
    return [None if t is None else t.contiguous() for t in tensors]
