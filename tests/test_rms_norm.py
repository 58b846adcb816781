"""rms_norm: native at every level, Triton and the reference against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter
from lora_tools import BF16, F32, FLOATS, level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import BackendUnavailable, rms_norm, use_backend
from peft_kernels.ops import rms_norm as op
from peft_kernels.testing import assert_no_worse, assert_same_bits

EPS = 1e-5
needs_triton = pytest.mark.skipif(bool(op.forward_op.load("triton").available()), reason="Triton is not installed")


level = level_fixture()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> list[Tensor]:
    """dy, x, weight."""
    shapes = (shape, shape, shape[-1:])
    dy, x, weight = (torch.randn(s, dtype=torch.float64, device=device) for s in shapes)
    return [dy.to(dtype), (x * scale + 0.3).to(dtype), (weight + 1).to(dtype)]


def check(dy: Tensor, x: Tensor, weight: Tensor, eps: float = EPS) -> None:
    exact = [t.double() for t in (dy, x, weight)]
    assert_no_worse(op.forward_op.op(x, weight, eps), op.forward_op.reference(x, weight, eps),
                    op.forward_op.reference(*exact[1:], eps))  # fmt: skip
    # dx is a difference: what its terms are has the precision
    inverse = torch.rsqrt(exact[1].square().mean(-1, keepdim=True) + eps)
    g = (exact[0] * exact[2]).abs()
    size = inverse * (g + exact[1].abs() * (g * exact[1].abs()).mean(-1, keepdim=True) * inverse.square())
    assert_no_worse(op.backward_op.op(dy, x, weight, eps), op.backward_op.reference(dy, x, weight, eps),
                    op.backward_op.reference(*exact, eps), size)  # fmt: skip


SHAPES = [(1, 1), (2, 3), (5, 16), (3, 65), (2, 3, 70), (7, 576), (1, 2049), (40, 1000), (2, 9000)]


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_size(level: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(*inputs(shape, dtype))
    check(*inputs((4, 50), dtype), eps=0.0)


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_magnitude(level: str, dtype: torch.dtype) -> None:
    """eps alone, eps and the mean alike, the mean alone; and rows of zeros."""
    for scale in (1e-9, 3e-3, 1e4, 1e15):
        check(*inputs((6, 100), dtype, scale))
    dy, _, weight = inputs((2, 40), dtype)
    check(dy, torch.zeros_like(dy), weight)


@needs_native
def test_a_weight_of_another_type(level: str) -> None:
    for dtype, other in itertools.permutations(FLOATS, 2):
        dy, x, weight = inputs((5, 75), dtype)
        check(dy, x, weight.to(other))


@needs_native
def test_infinities_and_nan_stay_in_their_rows(level: str) -> None:
    dy, x, weight = inputs((4, 40), F32)
    want = rms_norm(x, weight, EPS), op.backward_op.op(dy, x, weight, EPS)
    x[1, 7], x[2, 39] = float("nan"), float("inf")
    got = rms_norm(x, weight, EPS), op.backward_op.op(dy, x, weight, EPS)
    for mine, clean in zip(got, want, strict=True):
        assert mine[1].isnan().all()
        assert mine[2, 39].isnan()
        assert_same_bits(mine[[0, 3]], clean[[0, 3]])


@needs_native
def test_same_bits_on_one_and_two_threads_and_alone(level: str) -> None:
    dy, x, weight = inputs((50, 600), BF16)
    runs = []
    for n in (1, 2):
        with threads(n):
            runs.append([op.forward_op.op(x, weight, EPS), op.backward_op.op(dy, x, weight, EPS)])
    alone = [op.forward_op.op(x[40:41], weight, EPS), op.backward_op.op(dy[40:41], x[40:41], weight, EPS)]
    for a, b, one in zip(*runs, alone, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a[40:41], one)


@needs_native
def test_strides_and_empty() -> None:
    dy, x, weight = inputs((6, 10), F32)
    want = rms_norm(x, weight, EPS)
    wide = torch.cat([x, x], 1)[:, :10]
    assert_same_bits(rms_norm(wide, torch.stack([weight, weight], 1)[:, 0], EPS), want)
    want = op.backward_op.op(dy, x, weight, EPS)
    assert_same_bits(op.backward_op.op(dy.t().contiguous().t(), wide, weight, EPS), want)
    assert rms_norm(x.t().contiguous().t(), weight, EPS).is_contiguous()
    assert rms_norm(x[:0], weight, EPS).shape == (0, 10)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(dtype: torch.dtype, trained: tuple[bool, bool]) -> None:
    """Those that are wanted, also of the weight; x alone is kept, beside the weight."""
    dy, x, weight = inputs((2, 5, 96), dtype)

    def run(norm: object, dy: Tensor, *leaves: Tensor) -> list[Tensor]:
        leaves = tuple(t.detach().requires_grad_(on) for t, on in zip(leaves, trained, strict=True))
        y = norm(*leaves, EPS)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)]

    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = run(rms_norm, dy, x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}
    eager, exact = run(op.forward_op.reference, dy, x, weight), run(op.forward_op.reference, *(
        t.double() for t in (dy, x, weight)))  # fmt: skip
    for mine, theirs, right in zip(got, eager, exact, strict=True):
        assert_no_worse(mine, theirs, right, right.abs().amax().expand(right.shape))


@pytest.mark.slow
def test_gradcheck_and_opcheck() -> None:
    dy, x, weight = inputs((3, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x.requires_grad_(), weight.requires_grad_()))
    dy, x, weight = inputs((3, 4), F32)
    torch.library.opcheck(op.forward_op.op, (x, weight, EPS))
    torch.library.opcheck(op.backward_op.op, (dy, x, weight, EPS))


def test_one_graph() -> None:
    _, x, weight = inputs((3, 8), F32)
    compiled = torch.compile(lambda x: rms_norm(x, weight, EPS), backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    got, want = compiled(x), rms_norm(x, weight, EPS)
    assert_same_bits(got, want)
    assert_same_bits(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


def test_bad_input() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[4\], one for each feature of x, got \(3,\)"):
        rms_norm(x, torch.randn(3), EPS)
    with pytest.raises(TypeError, match=r"rms_norm: x must be a floating-point tensor, got torch\.int64"):
        rms_norm(x.long(), weight, EPS)
    with pytest.raises(TypeError, match=r"rms_norm: weight must be a floating-point tensor, got torch\.int64"):
        rms_norm(x, weight.long(), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: eps must be 0 or above, got -1\.0"):
        rms_norm(x, weight, -1.0)
    with pytest.raises(ValueError, match=r"rms_norm: x must be \[\.\.\., N\], N at least 1, got \(3, 0\)"):
        rms_norm(x[:, :0], weight[:0], EPS)
    with pytest.raises(ValueError, match=r"rms_norm_backward: dy must be torch\.float32 \(3, 4\) on cpu like x"):
        op.backward_op.op(x[:2], x, weight, EPS)


@needs_native
def test_native_takes_one_dtype() -> None:
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"weight is torch\.float64"):
        rms_norm(torch.randn(3, 4), torch.randn(4).double(), EPS)


# ---- Triton: in its interpreter, which is chosen when Triton is imported, so in a process of its own -----------------
@needs_triton
@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@needs_triton
@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device(dtype: torch.dtype) -> None:
    with use_backend("triton"):
        for shape in SHAPES:
            check(*inputs(shape, dtype, device=DEVICE))
        dy, x, weight = inputs((4, 33), dtype, device=DEVICE)
        check(dy, x, weight.float())
        assert rms_norm(x[:0], weight, EPS).shape == (0, 33)


@needs_triton
def test_rows_that_no_program_holds_are_refused() -> None:
    x = torch.zeros(1, 16385)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="more than 16384 features"):
        rms_norm(x, x[0], EPS)
