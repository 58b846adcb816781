"""peft_kernels: fused kernels for parameter-efficient fine-tuning. Tensors in, tensors out; needs torch alone."""

from __future__ import annotations

from . import dispatch
from .dispatch import BackendUnavailable, explain, use_backend
from .formats import FP4_TABLE, NF4_TABLE, AdapterStack, QuantWeight
from .ops.butterfly_linear import butterfly_linear
from .ops.butterfly_rotate import block_rotate, butterfly_rotate
from .ops.cayley import cayley
from .ops.dequantize_4bit import dequantize_4bit
from .ops.dora_linear import dora_linear
from .ops.dora_norm import dora_norm, squared_row_norms
from .ops.householder_rotate import householder_rotate
from .ops.lora_linear import lora_linear
from .ops.lora_linear_stacked import Projection, lora_linear_stacked
from .ops.multi_lora_linear import multi_lora_linear
from .ops.pair_rotate import pair_rotate
from .ops.quantize_4bit import quantize_4bit
from .ops.rms_norm import rms_norm
from .ops.rotary_attention import rotary_attention
from .ops.swiglu import swiglu
from .ops.swiglu.mlp import swiglu_mlp
from .philox import draw_seed

__version__ = "0.1.0"

__all__ = [
    "FP4_TABLE",
    "NF4_TABLE",
    "AdapterStack",
    "BackendUnavailable",
    "Projection",
    "QuantWeight",
    "block_rotate",
    "butterfly_linear",
    "butterfly_rotate",
    "cayley",
    "dequantize_4bit",
    "dora_linear",
    "dora_norm",
    "draw_seed",
    "explain",
    "householder_rotate",
    "lora_linear",
    "lora_linear_stacked",
    "multi_lora_linear",
    "pair_rotate",
    "quantize_4bit",
    "rms_norm",
    "rotary_attention",
    "squared_row_norms",
    "swiglu",
    "swiglu_mlp",
    "use_backend",
]

dispatch.check_environment()  # the ops are known now, so a misspelt one can be named
