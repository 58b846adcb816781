"""butterfly_rotate (block_rotate), cayley, householder_rotate, pair_rotate: reference, and native at every level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lora_tools import BF16, F16, F32, FLOATS, LEVELS, at_level, level_fixture, needs_native, saved_bytes, threads
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

from bench.flops import flops_of
from peft_kernels import block_rotate, butterfly_rotate, cayley, householder_rotate, pair_rotate
from peft_kernels.ops import butterfly_rotate as butterfly_op
from peft_kernels.testing import assert_no_worse, assert_same_bits

level = level_fixture("reference")


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ---- what the operators are, from their definitions ------------------------------------------------------------------
def dense_butterfly(blocks: Tensor, d: int) -> Tensor:
    """M_{m-1} ... M_0 as one matrix, from where each block's half blocks lie."""
    m, count, b = blocks.shape[:3]
    total = torch.eye(d, dtype=blocks.dtype)
    for i in reversed(range(m)):
        factor = torch.zeros(d, d, dtype=blocks.dtype)
        for n in range(d // b):
            if i == 0:
                places = torch.arange(b) + n * b
            else:
                half, group, j = b // 2, n >> i, n % 2**i
                low = (group * 2 ** (i + 1) + j) * half
                places = torch.cat([torch.arange(half) + low, torch.arange(half) + low + half * 2**i])
            factor[places[:, None], places] = blocks[i, n if count > 1 else 0]
        total = total @ factor
    return total


@pytest.mark.parametrize("shape", FACTORS, ids=str)
def test_a_butterfly_is_its_dense_matrix(shape: tuple[int, int, int, int]) -> None:
    rows, d, m, b = shape
    x, blocks = rand(rows, d), make_blocks(m, d // b, b, torch.float64)
    dense = dense_butterfly(blocks, d)
    for transposed in (False, True):
        matrix = dense.T if transposed else dense
        want = x @ matrix
        assert_no_worse(butterfly_rotate(x, blocks, transposed), want, want, x.abs() @ matrix.abs() * m)


def test_orthogonal_blocks_turn_back() -> None:
    r = cayley(skew_blocks(3 * 8, 4, 1.0).double().view(3, 8, 4, 4))
    x = rand(5, 32)
    again = butterfly_rotate(butterfly_rotate(x, r), r, transposed=True)
    assert_no_worse(again, x, x, x.norm(dim=1, keepdim=True).expand_as(x))


def test_block_rotate_is_one_factor() -> None:
    x, blocks = rand(2, 3, 12), make_blocks(1, 3, 4, torch.float64)
    assert_same_bits(block_rotate(x, blocks[0]), butterfly_rotate(x, blocks))
    assert_same_bits(block_rotate(x, blocks[0, :1]), butterfly_rotate(x, blocks[:, :1].expand(1, 3, 4, 4)))


@pytest.mark.parametrize("r", [1, 2, 5])
def test_householder_is_its_reflections(r: int) -> None:
    x, u = rand(4, 9), rand(9, r)
    want = {False: x, True: x}
    for transposed in want:
        for i in reversed(range(r)) if transposed else range(r):
            unit = u[:, i] / u[:, i].norm()
            want[transposed] = want[transposed] - 2 * torch.outer(want[transposed] @ unit, unit)
        got = householder_rotate(x, u, transposed=transposed)
        assert_no_worse(got, want[transposed], want[transposed], x.norm(dim=1, keepdim=True).expand_as(x) * 8)
    basis = torch.linalg.qr(u)[0]
    again = householder_rotate(x, basis, orthonormal=True)
    want_again = x - 2 * x @ basis @ basis.T
    assert_no_worse(again, want_again, want_again, x.norm(dim=1, keepdim=True).expand_as(x))


@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
def test_exact_cayley_is_orthogonal(level: str, size: float) -> None:
    """max |R^T R - I| <= 2e-6 in float32 up to blocks of 64 (LAPACK: more for wild generators)."""
    for b in (1, 2, 3, 4, 8, 17, 32, 64):
        r = cayley(skew_blocks(5, b, size)).double()
        error = (r.mT @ r - torch.eye(b, dtype=torch.float64)).abs().max()
        assert error <= 2e-6 * max(1.0, size if level == "reference" else 1.0), (b, float(error))


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 8])
def test_the_series_leaves_out_what_it_says(terms: int) -> None:
    """The truncated form differs from the exact one by the powers beyond its last."""
    q = skew_blocks(6, 8, 0.1).double()
    left_out = 3 * torch.linalg.matrix_norm(q, 2) ** (1 if terms == 1 else 2 if terms == 2 else max(terms - 1, 3))
    difference = torch.linalg.matrix_norm(cayley(q, terms) - cayley(q), 2)
    assert bool((difference <= left_out).all())


@needs_native
@pytest.mark.parametrize("terms", [None, 5])
def test_a_thousand_steps_stay_orthogonal(terms: int | None) -> None:
    """Blocks learn to turn as others do: exact ones are rotations to 2e-6 throughout, the series to what it omits."""
    torch.manual_seed(0)
    target = cayley(skew_blocks(3, 32, 0.3))
    q = torch.zeros(3, 32, 32, requires_grad=True)
    optimizer = torch.optim.Adam([q], lr=1e-3)
    eye, losses = torch.eye(32, dtype=torch.float64), []
    for step in range(1000):
        skewed = (q - q.mT) / 2
        r = cayley(skewed, terms)
        loss = (r - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            exact = r.detach().double()
            # R = I + 2 (Q + Q^2 + Q^3) + Q^4 for five terms: R^T R differs from I in powers from the fourth on
            left_out = 0.0 if terms is None else 8 * torch.linalg.matrix_norm(skewed.detach().double(), 2).max() ** 4
            assert (exact.mT @ exact - eye).abs().max() <= 2e-6 + left_out
    assert losses[-1] < 0.1 * losses[0]


# ---- gradients of the reference --------------------------------------------------------------------------------------
GRADIENTS: dict[str, Callable[[], tuple[Callable[..., Tensor], list[Tensor]]]] = {
    "butterfly": lambda: (butterfly_rotate, [rand(3, 16), make_blocks(2, 4, 4, torch.float64)]),
    "transposed": lambda: (lambda x, r: butterfly_rotate(x, r, True), [rand(3, 16), make_blocks(3, 4, 4).double()]),
    "shared": lambda: (block_rotate, [rand(2, 9), make_blocks(1, 1, 3, torch.float64)[0]]),
    "cayley": lambda: (cayley, [skew_blocks(2, 3, 1.0).double()]),
    "series": lambda: (lambda q: cayley(q, 5), [skew_blocks(2, 3, 1.0).double()]),
    "short series": lambda: (lambda q: cayley(q, 2), [skew_blocks(2, 3, 1.0).double()]),
    "householder": lambda: (householder_rotate, [rand(3, 7), rand(7, 3)]),
    "householder back": lambda: (lambda x, u: householder_rotate(x, u, transposed=True), [rand(3, 7), rand(7, 2)]),
    "pairs": lambda: (lambda x, f, s: pair_rotate(x, f, s, 2), [rand(3, 8), rand(8), rand(8)]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    function, inputs = GRADIENTS[name]()
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs])


# ---- backends against float64 ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_butterflies(level: str, dtype: torch.dtype) -> None:
    for i, (rows, d, m, b) in enumerate(FACTORS):
        check_butterfly(rows, d, m, b, dtype, transposed=i % 2 == 1)
    check_butterfly(0, 8, 1, 4, dtype)
    check_butterfly(9, 8, 1, 4, dtype, shared=True)
    check_butterfly(140, 96, 1, 32, dtype, shared=True, transposed=True)
    check_butterfly(1100, 24, 2, 4, dtype, shared=True, transposed=True)


@pytest.mark.parametrize("blocks_dtype", [BF16, F16], ids=str)
def test_blocks_of_another_dtype(level: str, blocks_dtype: torch.dtype) -> None:
    check_butterfly(5, 16, 2, 4, F32, blocks_dtype=blocks_dtype)


def test_cayleys(level: str) -> None:
    for count, b in ((3, 1), (5, 2), (4, 3), (16, 4), (2, 19), (3, 32), (2, 65)):
        for terms in (0, 1, 2, 3, 5, 6):
            check_cayley(count, b, terms, 0.5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_householders(level: str, dtype: torch.dtype) -> None:
    for rows, d, r in ((1, 1, 1), (5, 7, 2), (3, 64, 8), (70, 100, 3), (33, 576, 9), (2, 16, 0), (0, 8, 2)):
        check_householder(rows, d, r, dtype)
    check_householder(6, 40, 5, dtype, BF16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pairs(level: str, dtype: torch.dtype) -> None:
    for rows, d, half in ((1, 2, 1), (5, 12, 3), (3, 128, 32), (300, 40, 20), (7, 96, 16), (0, 4, 2)):
        check_pairs(rows, d, half, dtype)
    check_pairs(4, 64, 32, dtype, BF16)


@needs_native
def test_native_bits_do_not_depend_on_threads() -> None:
    found = []
    for n in (1, 2):
        torch.manual_seed(0)
        with threads(n), at_level(LEVELS[-1]):
            found.append([
                *check_butterfly(1500, 96, 2, 8, F32), *check_butterfly(1500, 96, 1, 8, BF16, shared=True),
                *check_householder(700, 96, 4, F32), *check_pairs(700, 96, 16, F32), *check_cayley(9, 8, 0, 1.0),
            ])  # fmt: skip
    for one, two in zip(*found, strict=True):
        assert_same_bits(one, two)


def test_nothing_but_inputs_is_kept() -> None:
    x, r = torch.randn(64, 64, requires_grad=True), make_blocks(3, 16, 4).requires_grad_()
    assert saved_bytes(lambda: butterfly_rotate(x, r), [x, r]) == 0
    first, second = torch.randn(2, 64).requires_grad_().unbind(0)
    assert saved_bytes(lambda: pair_rotate(x, first, second, 8), [x, first, second]) == 0
    u = torch.randn(64, 4)
    assert saved_bytes(lambda: householder_rotate(x, u), [x]) <= (64 + 3 * 64) * 4 * 4  # s, and u's and v's rows
    frozen = make_blocks(3, 16, 4)
    assert saved_bytes(lambda: butterfly_rotate(x, frozen), [frozen]) == 0  # then not even x


def test_transposed_and_strided_rows(level: str) -> None:
    x, r = torch.randn(16, 6), make_blocks(1, 4, 4)
    assert_same_bits(butterfly_rotate(x.t().reshape(2, 3, 16), r).view(6, 16), butterfly_rotate(x.t().contiguous(), r))
    wide = torch.randn(5, 32)
    assert_same_bits(butterfly_rotate(wide[:, ::2], r), butterfly_rotate(wide[:, ::2].contiguous(), r))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "size": (lambda: butterfly_rotate(torch.ones(2, 10), torch.ones(1, 2, 4, 4)), "for 10 features"),
    "not square": (lambda: butterfly_rotate(torch.ones(2, 8), torch.ones(1, 2, 4, 2)), r"\[m, D, b, b\]"),
    "odd with two factors": (lambda: butterfly_rotate(torch.ones(2, 12), torch.ones(2, 4, 3, 3)), "of even size"),
    "too few": (lambda: butterfly_rotate(torch.ones(2, 8), torch.ones(3, 2, 4, 4)), r"divisible by 2\^2"),
    "integers": (lambda: butterfly_rotate(torch.ones(2, 8), torch.ones(1, 2, 4, 4, dtype=torch.int64)), "floating"),
    "terms": (lambda: cayley(torch.zeros(1, 2, 2), 0), "None or 1..100"),
    "cayley": (lambda: cayley(torch.zeros(1, 2, 3)), r"\[D, b, b\]"),
    "u": (lambda: householder_rotate(torch.ones(2, 8), torch.ones(4, 2)), r"\[d, r\]"),
    "half": (lambda: pair_rotate(torch.ones(2, 8), torch.ones(8), torch.ones(8), 3), "divides 8"),
    "columns": (lambda: pair_rotate(torch.ones(2, 8), torch.ones(4), torch.ones(8), 2), r"\[8\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, text = BAD[name]
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_flops_are_declared() -> None:
    x, r = torch.randn(8, 64, requires_grad=True), make_blocks(2, 16, 4).requires_grad_()
    once = 2 * 8 * 64 * 4  # of one factor; the backward has the first factor again, two gradients of two factors
    assert flops_of(lambda: butterfly_rotate(x, r).sum().backward()) == once * (2 + 1 + 4)
    u = torch.randn(64, 3)
    assert butterfly_op.forward_op.flops is not None
    assert flops_of(lambda: householder_rotate(x.detach(), u)) >= 4 * 8 * 64 * 3
