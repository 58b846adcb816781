"""Every operator over every format of weights on Triton: the decode bit for bit, the operators against float64.

As test_triton_multi.py: `test_in_the_interpreter` starts a process on this same file, in which Triton interprets.
"""

from __future__ import annotations

import pytest
import torch
from format_ops import CALLS, IN_GROUPS, K, N, hold, some
from forms import grid, matrix
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter, small_tiles

import peft_kernels as pk
from peft_kernels import QuantWeight, dequantize_4bit, tuning, use_backend
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_affine_weight, random_quant_weight

pytest.importorskip("triton", reason="Triton is not installed")
SHORT = ["q4_0", "q4_k", "int4", "q5_1", "int8", "mxfp4", "q6_k"]  # one to an operator
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


def same_decode(w: QuantWeight, dtype: torch.dtype) -> None:
    with use_backend("reference"):
        want = dequantize_4bit(w, dtype)
    with use_backend("triton"):
        assert_same_bits(dequantize_4bit(w.to(DEVICE), dtype).cpu(), want)


@on_device
@pytest.mark.parametrize(("name", "dtype"), grid(IN_GROUPS, DTYPES, strength=1))
def test_device_decodes_the_bits_of_the_reference(name: str, dtype: torch.dtype) -> None:
    same_decode(random_quant_weight(33, 512, quant_type=name), dtype)


@on_device
@pytest.mark.parametrize(("name", "zeros", "shifts", "act_order"), grid(
    ["int4", "int8", "uint8"], ["codes", "values", None], [False, True], [False, True], strength=1
))  # fmt: skip
def test_device_decodes_integers(name: str, zeros: str | None, shifts: bool, act_order: bool) -> None:
    """Groups that are and are not whole in tiles, of rows that are and are not whole in bytes."""
    sizes = ((64, 256), (16, 128), (48, 100), (33, 99), (128, 130), (130, 130))
    for (group, k), scales in zip(sizes, [*DTYPES, *DTYPES], strict=True):
        w = random_affine_weight(33, k, name, group, zeros=zeros, shifts=shifts, act_order=act_order, scales=scales)
        same_decode(w, torch.float32)


@on_device
@pytest.mark.parametrize(("name", "op"), matrix(
    [(name, op) for name in IN_GROUPS for op in CALLS], short=list(zip(SHORT, CALLS, strict=True))
))  # fmt: skip
def test_device_operators(name: str, op: str) -> None:
    at = IN_GROUPS.index(name) + list(CALLS).index(op)
    rows, dtype = (7, 1, 40)[at % 3], DTYPES[at % 2 if at % 5 else 2]
    weight = random_quant_weight(N, K, quant_type=name, seed=4).to(DEVICE)
    wide = {"BN": 64, "BK": 64}  # half as many steps as of small tiles
    with small_tiles(), tuning.override("forward", **wide), tuning.override("backward", **wide):
        hold(CALLS[op], some(rows, K, seed=rows).to(dtype).to(DEVICE), weight, "triton")


@on_device
def test_device_norms_of_rows() -> None:
    for name in ("int4", "q6_k"):
        w = random_quant_weight(N, K, quant_type=name).to(DEVICE)
        with use_backend("reference"):
            eager, exact = pk.squared_row_norms(w), pk.squared_row_norms(dequantize_4bit(w, torch.float64))
        with use_backend("triton"):
            assert_no_worse(pk.squared_row_norms(w), eager, exact)


@on_device
def test_device_a_group_that_there_is_not_gives_nan_in_its_column() -> None:
    w = random_affine_weight(N, 64, act_order=True).to(DEVICE)
    assert w.nested_code is not None
    w.nested_code[5], w.nested_code[7] = 9, -1
    with use_backend("triton"):
        found = dequantize_4bit(w).isnan()
    assert found[:, [5, 7]].all()
    assert int(found.sum()) == 2 * N
