"""lora_mixture on Triton against float64: in Triton's interpreter, and on a GPU.

As test_triton_multi.py: `test_in_the_interpreter` starts a process on this same file, in which Triton interprets.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from forms import matrix
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter, small_tiles
from lora_tools import BF16, F16, F32
from mixture_tools import assert_same_sums, check_mixture, make_mixture

from peft_kernels import tuning, use_backend
from peft_kernels.ops import lora_mixture as op
from peft_kernels.testing import assert_same_bits

pytest.importorskip("triton", reason="Triton is not installed")


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@pytest.fixture
def small() -> Iterator[None]:
    with small_tiles(), use_backend("triton"):
        yield


CASES = {
    # rows of x, out and in features, adapters, ranks of each, what else
    "every weight": lambda t: make_mixture(20, 33, 64, 3, 7, dtype=t, blocksize=32, nested=True, bias=True),
    "weights of zero": lambda t: make_mixture(36, 24, 64, 5, 4, zeros="top", dtype=t, nested=True, p=0.25, ab=F16),
    "masked": lambda t: make_mixture(36, 24, 64, 3, 16, zeros="top", masked=True, dtype=t, nested=True),
    "the base alone": lambda t: make_mixture(5, 24, 64, 2, 3, zeros="all", masked=True, dtype=t, bias=True),
    "rank 0": lambda t: make_mixture(5, 24, 64, 2, 0, dtype=t),
    "any layout": lambda t: make_mixture(19, 31, 77, 4, 5, zeros="some", dtype=t, quant="fp4", p=0.3, ab=BF16),
    "dense": lambda t: make_mixture(18, 20, 50, 2, 20, zeros="first", masked=True, dtype=t, quant="dense", w_dtype=t,
                                    ab=t, p=0.5),
}  # fmt: skip


@on_device
@pytest.mark.parametrize(("name", "dtype"), matrix(
    [(name, dtype) for name in CASES for dtype in (F32, F16, BF16)],
    short=[("every weight", F16), ("masked", F32), ("rank 0", F32), ("dense", BF16)],
))  # fmt: skip
def test_device_cases(small: None, name: str, dtype: torch.dtype) -> None:
    check_mixture(CASES[name](dtype).on(DEVICE))


@on_device
@pytest.mark.parametrize("ab", matrix([F32, F16], short=[F32]))
def test_device_parts_that_are_not_needed(small: None, ab: torch.dtype) -> None:
    """Without gradients of the weights tiles of zeros are left out in the backward, too; all else is the same."""
    c = make_mixture(36, 20, 64, 3, 4, zeros="top", quant="dense", ab=ab).on(DEVICE)
    _, s = c.forward(op.forward_op.op)
    whole = c.backward(op.backward_op.op, s)
    for need in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        part = c.backward(op.backward_op.op, s, *need)
        for one, all_, wanted in zip(part, whole, (need[0], need[1], need[1], need[2]), strict=True):
            assert one.shape == (all_.shape if wanted else (0,))
            assert_same_sums(one, all_ if wanted else one)


@on_device
def test_device_adapters_that_no_row_uses_are_not_read(small: None) -> None:
    """NaNs in what a tile leaves out reach nothing, forward and backward."""
    c = make_mixture(36, 24, 64, 4, 16, zeros="top", masked=True, quant="dense").on(DEVICE)
    used, results = c.mix.any(0), []
    assert not used.all()
    for value in (1.0, float("nan")):
        c.a[~used], c.b[:, ~used] = value, value
        y, s = c.forward(op.forward_op.op)
        results.append((y, s, *c.backward(op.backward_op.op, s)))
    for got, one in zip(*results, strict=True):
        assert_same_bits(got, one)


@on_device
def test_device_many_rows_take_the_vendors_matmul(small: None) -> None:
    c = make_mixture(24, 20, 64, 3, 6, zeros="top", dtype=F16, nested=True, p=0.1).on(DEVICE)
    with tuning.override("panels", from_M=20, from_M_backward=20):
        check_mixture(c)
