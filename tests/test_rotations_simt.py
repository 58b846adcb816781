"""CUDA backend of the rotations: the host build of its sources (csrc/simt); the same tests on a GPU where there is
one."""

from __future__ import annotations

import runpy
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from lora_tools import BF16, F16, F32, FLOATS
from rotation_tools import (
    FACTORS,
    check_butterfly,
    check_cayley,
    check_householder,
    check_pairs,
    make_blocks,
    skew_blocks,
)
from torch import Tensor

from peft_kernels import use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.ops import butterfly_rotate as butterfly_op
from peft_kernels.ops import cayley as cayley_op
from peft_kernels.ops import householder_rotate as householder_op
from peft_kernels.ops import pair_rotate as pair_op
from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed, device = (tools[name] for name in ("simt", "races", "seed", "device"))


MORE_FACTORS = [  # what FACTORS lacks: tensor cores with several windows of features, several tiles and parts of rows
    (300, 64, 1, 16), (40, 192, 1, 96), (17, 160, 1, 80), (33, 192, 3, 16), (20, 128, 2, 64), (64, 96, 2, 16),
    (70, 144, 1, 48), (40, 512, 2, 128), (31, 65, 1, 65),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_butterflies(device: str, transposed: bool, dtype: torch.dtype) -> None:
    for i, (rows, d, m, b) in enumerate(FACTORS + MORE_FACTORS):
        check_butterfly(rows, d, m, b, dtype, transposed=(i % 2 == 0) == transposed, device=device)
    for rows, d, m, b in ((9, 8, 1, 4), (33, 64, 1, 16), (20, 64, 2, 16), (5, 24, 2, 4), (3, 8, 2, 4)):
        check_butterfly(rows, d, m, b, dtype, shared=True, transposed=transposed, device=device)
    check_butterfly(0, 32, 1, 16, dtype, transposed=transposed, device=device)
    check_butterfly(0, 8, 2, 2, dtype, transposed=transposed, device=device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_blocks_of_every_size(device: str, dtype: torch.dtype) -> None:
    for b in (*range(2, 33), 48, 64, 100, 128, 255, 256):
        check_butterfly(17, b * (3 if b < 64 else 1), 1, b, dtype, transposed=b % 3 == 0, device=device)


@pytest.mark.parametrize("blocks_dtype", [BF16, F16], ids=str)
def test_blocks_of_another_dtype(device: str, blocks_dtype: torch.dtype) -> None:
    check_butterfly(18, 32, 2, 8, BF16, blocks_dtype=blocks_dtype, device=device)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_blocks_beyond_float16(device: str, size: float) -> None:
    """On tensor cores a matrix is in 16 bits: what float16 cannot hold must count all the same."""
    x, blocks = torch.randn(20, 32, device=device) / size, make_blocks(1, 2, 16, device=device) * size
    x = x.clamp(-6e4, 6e4).half()
    exact = butterfly_op.forward_op.reference(x.double(), blocks.double(), False)
    magnitude = butterfly_op.forward_op.reference(x.double().abs(), blocks.double().abs(), False)
    eager = butterfly_op.forward_op.reference(x, blocks, False)
    assert_no_worse(butterfly_op.forward_op.op(x, blocks, False), eager, exact, magnitude)


def test_what_is_not_served_says_why(device: str) -> None:
    x, blocks = torch.zeros(2, 1024, device=device), torch.zeros(3, 8, 128, 128, device=device)
    with pytest.raises(BackendUnavailable, match="factors reach 512 features, above 256"):
        butterfly_op.forward_op.op(x, blocks, False)
    with pytest.raises(BackendUnavailable, match="blocks of more than 64"):
        cayley_op.forward_op.op(torch.zeros(1, 65, 65, device=device), 0)
    with pytest.raises(BackendUnavailable, match="more than 64 reflections"):
        householder_op.forward_op.op(*torch.zeros(3, 65, 128, device=device))
    with pytest.raises(BackendUnavailable, match="float64"):
        cayley_op.forward_op.op(torch.zeros(1, 2, 2, dtype=torch.float64, device=device), 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pairs(device: str, dtype: torch.dtype) -> None:
    for rows, d, half in ((1, 2, 1), (5, 12, 3), (33, 128, 32), (7, 320, 16), (70, 1032, 4), (3, 600, 300), (0, 4, 2)):
        check_pairs(rows, d, half, dtype, device=device)
    check_pairs(4, 64, 32, dtype, F16, device=device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_householders(device: str, dtype: torch.dtype) -> None:
    for rows, d, r in ((1, 1, 1), (5, 7, 2), (3, 64, 8), (70, 100, 3), (33, 576, 9), (2, 16, 0), (0, 8, 2)):
        check_householder(rows, d, r, dtype, device=device)
    check_householder(6, 1100, 20, dtype, device=device)
    check_householder(9, 130, 64, dtype, device=device)
    check_householder(6, 40, 5, dtype, BF16, device=device)
    check_householder(1, 0, 3, dtype, device=device)


def test_rows_of_one_warp_each(device: str) -> None:
    """So many rows that no two warps share one, and rows in many parts."""
    check_householder(8450, 12, 3, BF16, device=device)


def test_cayleys(device: str) -> None:
    for count, b in ((3, 1), (5, 2), (70, 3), (19, 4), (5, 8), (3, 9), (2, 16), (2, 19), (3, 32), (2, 37), (1, 64)):
        for terms in (0, 1, 2, 3, 5, 6):
            check_cayley(count, b, terms, 0.5, device=device)
    check_cayley(2, 8, 100, 0.5, device=device)
    check_cayley(0, 8, 0, 0.5, device=device)


@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
def test_exact_blocks_are_orthogonal(device: str, size: float) -> None:
    """max |R^T R - I| <= 2e-6, however wild the generator."""
    for b in (1, 2, 3, 4, 8, 17, 32, 64):
        r = cayley_op.forward_op.op(skew_blocks(5, b, size, device), 0).double()
        assert (r.mT @ r - torch.eye(b, dtype=torch.float64, device=device)).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_of_everything(device: str, dtype: torch.dtype) -> None:
    """Every kernel on few numbers, at the ends of tiles: what AddressSanitizer looks at."""
    for i, (rows, d, m, b) in enumerate(((3, 9, 1, 3), (5, 12, 1, 4), (7, 24, 2, 2), (17, 64, 2, 16), (18, 80, 1, 80))):
        check_butterfly(rows, d, m, b, dtype, transposed=i % 2 == 1, device=device)
    check_butterfly(17, 48, 1, 16, dtype, shared=True, device=device)
    for rows, d, half in ((1, 2, 1), (35, 40, 4), (3, 18, 3)):
        check_pairs(rows, d, half, dtype, device=device)
    for rows, d, r in ((5, 7, 2), (3, 132, 9), (2, 16, 0)):
        check_householder(rows, d, r, dtype, device=device)
    for count, b in ((70, 3), (2, 19), (1, 37)):
        check_cayley(count, b, 0, 0.5, device=device)
        check_cayley(count, b, 4, 0.5, device=device)


def moved(t: Tensor) -> Tensor:
    """The same values one element further on in memory: aligned for no vector."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_storage_that_starts_anywhere(device: str, dtype: torch.dtype) -> None:
    x, dy = (t.to(dtype) for t in torch.randn(2, 40, 64, device=device))
    first, second = torch.randn(2, 64, device=device)
    u, v = torch.randn(2, 3, 64, device=device)
    blocks = make_blocks(2, 16, 4, device=device)

    def results(*tensors: Tensor) -> list[Tensor]:
        x, dy, first, second, u, v, blocks = tensors
        y, s = householder_op.forward_op.op(x, u, v)
        return [
            pair_op.forward_op.op(x, first, second, 8), *pair_op.backward_op.op(dy, x, first, second, 8, True, True),
            y, s, *householder_op.backward_op.op(dy, x, u, v, s, True, True),
            butterfly_op.forward_op.op(x, blocks, True), *butterfly_op.backward_op.op(dy, x, blocks, True, True, True),
        ]  # fmt: skip

    tensors = (x, dy, first, second, u, v, blocks)
    expected = results(*tensors)
    for chosen in ((0,), (1,), (2, 4), (3, 5, 6)):
        found = results(*(moved(t) if i in chosen else t for i, t in enumerate(tensors)))
        for got, want in zip(found, expected, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_tensor_cores_need_no_alignment_to_be_right(device: str, dtype: torch.dtype) -> None:
    x, dy = (t.to(dtype) for t in torch.randn(2, 40, 64, device=device))
    blocks = make_blocks(1, 4, 16, device=device)
    exact = [t.double() for t in (dy, x, blocks)]
    sizes = butterfly_op.backward_op.reference(*(t.abs() for t in exact), False, True, True)
    wanted = butterfly_op.backward_op.reference(*exact, False, True, True)
    eager = butterfly_op.backward_op.reference(dy, x, blocks, False, True, True)
    for given in ((moved(dy), x, blocks), (dy, moved(x), blocks), (dy, x, moved(blocks))):
        for args in zip(butterfly_op.backward_op.op(*given, False, True, True), eager, wanted, sizes, strict=True):
            assert_no_worse(*args)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_matrices_count_beyond_16_bits(device: str, dtype: torch.dtype) -> None:
    """Where terms cancel, so that what a block rounds to in 16 bits is far from enough."""
    rows = torch.randn(4, 8, 1, 16, device=device) + torch.randn(4, 8, 2, 16, device=device) / 64
    blocks = rows.reshape(1, 4, 16, 16)
    x = torch.randn(20, 32, 1, device=device) * torch.tensor([1.0, -1.0], device=device)
    x = x.reshape(20, 64).to(dtype)
    exact = butterfly_op.forward_op.reference(x.double(), blocks.double(), False)
    eager = butterfly_op.forward_op.reference(x, blocks, False)
    size = exact.square().mean().sqrt().expand_as(exact)
    assert_no_worse(butterfly_op.forward_op.op(x, blocks, False), eager, exact, size)
    rounded = butterfly_op.forward_op.reference(x.double(), blocks.to(dtype).double(), False).to(dtype)
    with pytest.raises(AssertionError, match="worse than eager"):
        assert_no_worse(rounded, eager, exact, size)


# ---- the same bits ---------------------------------------------------------------------------------------------------
def run(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    with use_backend("cuda"):
        return [
            *check_pairs(70, 40, 4, dtype), *check_pairs(70, 18, 3, dtype), *check_butterfly(40, 24, 2, 4, dtype),
            *check_butterfly(70, 64, 2, 16, dtype, transposed=True), *check_butterfly(70, 18, 1, 6, dtype),
            *check_householder(37, 140, 9, dtype), *check_cayley(5, 3, 0, 0.5), *check_cayley(2, 19, 5, 0.5),
        ]  # fmt: skip


@lru_cache
def first(dtype: torch.dtype) -> list[Tensor]:
    return run(dtype)


def test_in_any_order_of_threads(simt, seed: int) -> None:
    for dtype in FLOATS:
        simt.pk_simt_set_seed(0)
        wanted = first(dtype)
        simt.pk_simt_set_seed(seed + 1)
        for got, want in zip(run(dtype), wanted, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_no_races(races, dtype: torch.dtype) -> None:
    races.pk_simt_set_seed(1)
    run(dtype)


@pytest.mark.slow
def test_nothing_out_of_bounds() -> None:
    tools["under_asan"](__file__, "-k", "few_of_everything or need_no or anywhere and bfloat16")
