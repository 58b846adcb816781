"""Calls over weights in groups (integers, blocks of GGUF) for the corpus of the C ABI, sound and refused."""

from __future__ import annotations

import random
from typing import Any

import torch

import peft_kernels as pk
from peft_kernels.formats import FORMATS
from peft_kernels.testing import random_affine_weight, random_quant_weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def of_formats(rng: random.Random) -> None:
    name, rows = rng.choice([*FORMATS]), rng.choice((1, 5, 67, 700))
    if name in ("int4", "int8", "uint8"):
        columns, group = rng.choice((1, 31, 64, 96, 130, 160)), rng.choice((7, 16, 32, 48, 64))
        weight = random_affine_weight(rows, columns, name, group,
                                      zeros=rng.choice(("codes", "values", None)), shifts=rng.random() < 0.3,
                                      act_order=rng.random() < 0.3, scales=rng.choice(FLOATS))  # fmt: skip
    else:
        weight = random_quant_weight(rows, rng.choice((256, 768)), quant_type=name, blocksize=32)
    pk.dequantize_4bit(weight, rng.choice(FLOATS))
    if rows < 100:
        x = torch.randn(rng.choice((1, 3, 4, 6, 9, 16)), weight.shape[1]).to(rng.choice(FLOATS)).requires_grad_()
        pk.lora_linear(x, weight).sum().backward()


def refused_formats(library: Any) -> list[int]:
    """Codes that the library gives for parts that it does not take."""
    code = []
    for kind, block, n, dtype in ((0, 64, 8, 0), (1, 48, 8, 0), (1, 64, -1, 0), (1, 64, 8, 3), (1, 64, 8, 0)):
        code += [library.pk_cpu_dequantize_4bit(0, 0, 0, 0, 0, kind, block, 256, n, dtype, 0, 1)]
    bad = ((2, 64, 8, 0), (16, 32, 32, 0), (6, 32, 8, 0), (6, 32, 32, 4), (3, 0, 8, 0), (3, 32, 8, 0))
    for kind, block, k, out in bad:
        code += [library.pk_cpu_dequantize_rows(0, 0, 0, 0, 0, kind, block, 4, 0, 4, k, out, 0, 1)]
    return code
