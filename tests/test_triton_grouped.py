"""grouped_linear on Triton against float64: in Triton's interpreter, and on a GPU.

As test_triton_multi.py: `test_in_the_interpreter` starts a process on this same file, in which Triton interprets.
"""

from __future__ import annotations

import os

import pytest
import torch
from forms import matrix
from grouped_tools import Case, check
from interpreter_tools import run_in_the_interpreter, small_tiles
from lora_tools import BF16, F16, F32

from peft_kernels import use_backend

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETER else "cuda"
on_device = pytest.mark.filterwarnings("ignore") if INTERPRETER else pytest.mark.gpu


@pytest.mark.skipif(INTERPRETER, reason="this is the interpreter's process")
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


CASES = {
    # ends of groups, out and in features
    "nested": lambda t: Case((0, 3, 3, 20, 37), 64, 256, dtype=t, weight="nested", ab=BF16),
    "nf4": lambda t: Case((0, 1, 2), 70, 128, dtype=t, weight="nf4", r=20),
    "dense": lambda t: Case((0, 2, 70), 31, 77, dtype=t, w_dtype=t, r=3, ab=t),
    "turned": lambda t: Case((0, 5, 9), 70, 90, dtype=t, weight="turned", w_dtype=t),
    "no rows": lambda t: Case((0, 0, 0), 30, 64, dtype=t, weight="nf4"),
    "the base alone": lambda t: Case((0, 5, 9), 30, 64, dtype=t, weight="nf4", r=0, bias=False),
}


@on_device
@pytest.mark.parametrize(("name", "dtype"), matrix(
    [(name, dtype) for name in CASES for dtype in (F32, F16, BF16)],
    short=[("nested", BF16), ("nf4", F32), ("dense", F16), ("turned", BF16),
           ("the base alone", F32), ("no rows", BF16)],
))  # fmt: skip
def test_device_cases(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with small_tiles(), use_backend("triton"):
        check(CASES[name](dtype).to(DEVICE), same_bits=False)
