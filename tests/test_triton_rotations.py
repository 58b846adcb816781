"""Triton backend of the rotations: in its interpreter, which is chosen when Triton is imported, so in a process of its
own; the same tests on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import share
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter, small_tiles
from lora_tools import BF16, F16, F32, FLOATS
from rotation_tools import check_butterfly, check_cayley, check_householder, check_pairs
from turned_tools import Turned, check_turned

from peft_kernels import BackendUnavailable, butterfly_rotate, cayley, householder_rotate, tuning, use_backend
from peft_kernels.ops import butterfly_rotate as op
from peft_kernels.triton_lib import host

needs_triton = pytest.mark.skipif(bool(op.forward_op.load("triton").available()), reason="Triton is not installed")
pytestmark = needs_triton


@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device_butterflies(dtype: torch.dtype) -> None:
    shapes = [(5, 12, 1, 4), (3, 9, 1, 3), (33, 64, 1, 32), (2, 192, 1, 96), (17, 24, 2, 2), (3, 128, 3, 4)]
    shapes.append((4, 60, 2, 6))
    with use_backend("triton"):
        for i, (rows, d, m, b) in share(dtype, FLOATS, enumerate(shapes)):
            check_butterfly(rows, d, m, b, dtype, transposed=i % 2 == 1, device=DEVICE)
        check_butterfly(2, 16, 1, 4, dtype, shared=True, transposed=True, device=DEVICE)
        check_butterfly(2, 16, 2, 4, dtype, shared=True, device=DEVICE)
        check_butterfly(0, 16, 1, 4, dtype, device=DEVICE)


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device_butterfly_linear(dtype: torch.dtype) -> None:
    with use_backend("triton"):
        cases = [Turned(5, 24, 64, 1, 32, 64), Turned(18, 20, 48, 2, 4, gain=True), Turned(0, 16, 32, 1, 4),
                 Turned(3, 16, 36, 1, 6, gain=True, bias=False, shared=True)]  # fmt: skip
        for case in share(dtype, FLOATS, cases):
            check_turned(case, dtype, DEVICE)


@on_device
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_device_few_rows_are_turned_inside_of_the_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 32 rows, one factor of blocks of up to 32: rows, features and blocks that fill no tile, and split sums; the
    weight on either side, as the compilers ask for (tuned/sm_90.json)."""
    turned: list[int] = []
    launch = host.launch

    def recorded(kernel: Any, *args: Any, **options: Any) -> None:
        turned.append(options.get("TURN", 0))
        launch(kernel, *args, **options)

    monkeypatch.setattr(host, "launch", recorded)
    few = [Turned(17, 40, 128, 1, 32, 64), Turned(3, 33, 112, 1, 4, gain=True), Turned(1, 7, 48, 1, 16, shared=True)]
    with use_backend("triton"), small_tiles(), tuning.override("turned", LEFT=dtype is BF16):
        for case in few[:: 1 if dtype is F16 else 2]:
            turned.clear()
            check_turned(case, dtype, DEVICE)
            assert max(turned) == case.b, case
        for case in (Turned(33, 8, 32, 1, 16), Turned(2, 8, 64, 1, 64), Turned(2, 8, 24, 1, 4)):
            turned.clear()
            if dtype is F16:
                check_turned(case, dtype, DEVICE)
            assert not any(turned), case


@on_device
def test_device_rows_in_parts() -> None:
    with use_backend("triton"):
        check_butterfly(1100, 8, 1, 8, F32, device=DEVICE)
        check_householder(1050, 8, 2, F32, device=DEVICE)
        check_pairs(300, 8, 2, F32, device=DEVICE)


@on_device
def test_device_cayley() -> None:
    with use_backend("triton"):
        for count, b in ((2, 1), (3, 4), (2, 19), (1, 32)):
            for terms in (0, 1, 2, 3, 5, 6):
                check_cayley(count, b, terms, 0.5, device=DEVICE)


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device_householder(dtype: torch.dtype) -> None:
    with use_backend("triton"):
        shapes = ((1, 1, 1), (5, 7, 2), (40, 200, 8), (3, 130, 17), (40, 70, 40), (0, 8, 2))
        for rows, d, r in share(dtype, FLOATS, shapes):
            check_householder(rows, d, r, dtype, device=DEVICE)
        check_householder(6, 40, 5, dtype, BF16, device=DEVICE)


@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device_pairs(dtype: torch.dtype) -> None:
    with use_backend("triton"):
        for rows, d, half in share(dtype, FLOATS, ((1, 2, 1), (5, 12, 3), (33, 128, 32), (7, 320, 16), (0, 4, 2))):
            check_pairs(rows, d, half, dtype, device=DEVICE)
        check_pairs(4, 64, 32, dtype, F16, device=DEVICE)


def test_what_no_program_holds_is_refused() -> None:
    x = torch.zeros(2, 1024)
    with use_backend("triton"):
        with pytest.raises(BackendUnavailable, match="factors reach 512 features, above 256"):
            butterfly_rotate(x, torch.zeros(3, 8, 128, 128))
        with pytest.raises(BackendUnavailable, match="blocks of more than 64"):
            cayley(torch.zeros(1, 65, 65))
        with pytest.raises(BackendUnavailable, match="more than 64 reflections"):
            householder_rotate(x, torch.zeros(1024, 65), orthonormal=True)
