"""peft_kernels: fused kernels for parameter-efficient fine-tuning. Tensors in, tensors out; needs torch alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import dispatch
from .dispatch import BackendUnavailable, explain, use_backend
from .formats import FP4_TABLE, NF4_TABLE, AdapterStack, QuantWeight
from .ops.attention import attention
from .ops.attention.rotary import rotary
from .ops.butterfly_linear import butterfly_linear
from .ops.butterfly_rotate import block_rotate, butterfly_rotate
from .ops.cayley import cayley
from .ops.dequantize_4bit import dequantize_4bit
from .ops.dora_linear import dora_gain, dora_linear, dora_linear_normed
from .ops.dora_norm import dora_norm, squared_row_norms
from .ops.gated import gated
from .ops.gated.mlp import gated_mlp
from .ops.grouped_linear import grouped_linear
from .ops.householder_rotate import compact_wy, householder_rotate
from .ops.lora_linear import lora_linear
from .ops.lora_linear_stacked import Projection, lora_linear_stacked
from .ops.lora_mixture import lora_mixture
from .ops.lora_shrink import lora_expand, lora_shrink
from .ops.multi_lora_linear import multi_lora_linear
from .ops.norms import layer_norm, rms_norm
from .ops.pair_rotate import pair_rotate
from .ops.quantize_4bit import quantize_4bit
from .philox import draw_seed
from .row_groups import RowGroups

if TYPE_CHECKING:
    from . import adamw, softmax_slice, tuning, tuning_launch, tuning_user, verdicts
    from .fingerprint import Fingerprint
    from .huge_pages import use_huge_pages
    from .native import NativeLibrary, native_library
    from .ops.multi_lora_linear.by_row import RowPlan, RowProjection, lora_linear_by_row
    from .prepared import PreparedCall

__version__ = "0.1.0"

# What needs the binding of the native library, or is of no use to a call: imported when asked for.
_LATER = {
    "fingerprint": ("Fingerprint",),
    "huge_pages": ("use_huge_pages",),
    "native": ("NativeLibrary", "native_library"),
    "ops.multi_lora_linear.by_row": ("RowPlan", "RowProjection", "lora_linear_by_row"),
    "prepared": ("PreparedCall",),
}
_HOMES = {name: home for home, names in _LATER.items() for name in names}

__all__ = [
    "FP4_TABLE",
    "NF4_TABLE",
    "AdapterStack",
    "BackendUnavailable",
    "Fingerprint",
    "NativeLibrary",
    "PreparedCall",
    "Projection",
    "QuantWeight",
    "RowGroups",
    "RowPlan",
    "RowProjection",
    "adamw",
    "attention",
    "block_rotate",
    "butterfly_linear",
    "butterfly_rotate",
    "cayley",
    "compact_wy",
    "dequantize_4bit",
    "dora_gain",
    "dora_linear",
    "dora_linear_normed",
    "dora_norm",
    "draw_seed",
    "explain",
    "gated",
    "gated_mlp",
    "grouped_linear",
    "householder_rotate",
    "layer_norm",
    "lora_expand",
    "lora_linear",
    "lora_linear_by_row",
    "lora_linear_stacked",
    "lora_mixture",
    "lora_shrink",
    "multi_lora_linear",
    "native_library",
    "pair_rotate",
    "quantize_4bit",
    "rms_norm",
    "rotary",
    "softmax_slice",
    "squared_row_norms",
    "tuning",
    "tuning_launch",
    "tuning_user",
    "use_backend",
    "use_huge_pages",
    "verdicts",
]

dispatch.check_environment()  # the ops are known now, so a misspelt one can be named


def __getattr__(name: str) -> Any:
    if name in ("adamw", "softmax_slice", "tuning", "tuning_launch", "tuning_user", "verdicts"):
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
