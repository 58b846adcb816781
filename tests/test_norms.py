"""rms_norm and layer_norm: native at every level, Triton and the reference against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from forms import grid
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter
from lora_tools import BF16, F32, FLOATS, level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import BackendUnavailable, layer_norm, rms_norm, use_backend
from peft_kernels.ops import norms as op
from peft_kernels.strides import with_heads
from peft_kernels.testing import assert_no_worse, assert_same_bits

EPS = 1e-5
NORMS = ["rms", "layer"]
needs_triton = pytest.mark.skipif(bool(op.rms_op.load("triton").available()), reason="Triton is not installed")


level = level_fixture()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> list[Tensor]:
    """dy, x, weight, bias."""
    shapes = (shape, shape, shape[-1:], shape[-1:])
    dy, x, weight, bias = (torch.randn(s, dtype=torch.float64, device=device) for s in shapes)
    return [dy.to(dtype), (x * scale + 0.3 * min(scale, 1.0)).to(dtype), (weight + 1).to(dtype), bias.to(dtype)]


def calls(
    norm: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """The arguments of the forward, and of the backward but for dy and what is needed."""
    return ((x, weight, eps, offset),) * 2 if norm == "rms" else ((x, weight, bias, eps), (x, weight, eps))


OPS = {"rms": (op.rms_op, op.rms_backward_op), "layer": (op.layer_op, op.layer_backward_op)}


def check(
    norm: str, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = EPS, offset: float = 0.0
) -> None:
    forward, backward = OPS[norm]
    given, given_back = calls(norm, x, weight, bias, eps, offset)
    exact, exact_back = calls(norm, x.double(), *(None if t is None else t.double() for t in (weight, bias)),
                              eps, offset)  # fmt: skip
    d, h = dy.double(), x.double()
    # x - mean, the offset and the bias are sums of terms, and dx is a difference: what the terms are has the precision
    size, f = h.abs(), torch.ones_like(h[:1]) if weight is None else weight.double().abs() + abs(offset)
    if norm == "layer":
        size, h = size + h.mean(-1, keepdim=True).abs(), h - h.mean(-1, keepdim=True)
    inverse = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    sizes = size * inverse * f + (0.0 if bias is None or norm == "rms" else bias.double().abs())
    assert_no_worse(forward.op(*given), forward.reference(*given), forward.reference(*exact), sizes)
    g = d.abs() * f
    sizes = inverse * (g + g.mean(-1, keepdim=True) * (norm == "layer")
                       + size * (g * size).mean(-1, keepdim=True) * inverse.square())  # fmt: skip
    got, eager = backward.op(dy, *given_back, True, True), backward.reference(dy, *given_back, True, True)
    right = backward.reference(d, *exact_back, True, True)
    assert_no_worse(got[0], eager[0], right[0], sizes)
    # of a long row c is a root of a sum of as many terms, one after the other in each lane
    long = 1 + x.shape[-1] / 4096
    rows = [t.reshape(-1, t.shape[-1]).sum(0) for t in (d.abs() * size * inverse * long, d.abs())]
    for mine, theirs, best, sums in zip(got[1:], eager[1:], right[1:], rows, strict=False):
        assert mine.dtype is torch.float32
        assert_no_worse(mine, theirs, best, sums)
    alone = backward.op(dy, *given_back, True, False)
    assert_same_bits(alone[0], got[0])
    assert all(t.numel() == 0 for t in alone[1:])
    sums_alone = backward.op(dy, *given_back, False, True)
    assert sums_alone[0].numel() == 0
    for mine, theirs in zip(sums_alone[1:], got[1:], strict=True):
        assert_same_bits(mine, theirs)


SHAPES = [(1, 1), (2, 3), (5, 16), (3, 65), (2, 3, 70), (7, 576), (1, 2049), (40, 1000), (2, 9000), (700, 24)]


@needs_native
@pytest.mark.parametrize(("norm", "dtype"), grid(NORMS, FLOATS), ids=str)
def test_any_size(level: str, norm: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(norm, *inputs(shape, dtype))
    dy, x, weight, bias = inputs((4, 50), dtype)
    check(norm, dy, x, weight, None, eps=0.0, offset=1.0)
    check(norm, dy, x, None, bias)
    check(norm, dy, x, None, None)


@needs_native
@pytest.mark.parametrize(("norm", "dtype"), grid(NORMS, [F32, BF16]), ids=str)
def test_any_magnitude(level: str, norm: str, dtype: torch.dtype) -> None:
    """eps alone, eps and the mean alike, the mean alone; and rows of zeros."""
    for scale in (1e-9, 3e-3, 1e4, 1e15):
        check(norm, *inputs((6, 100), dtype, scale))
    dy, _, weight, bias = inputs((2, 40), dtype)
    check(norm, dy, torch.zeros_like(dy), weight, bias)


@needs_native
def test_rows_far_from_zero(level: str) -> None:
    """The variance is that of the distances from the mean: no difference of two large means of squares."""
    dy, x, weight, bias = inputs((5, 300), F32)
    check("layer", dy, x + 1000.0, weight, bias)
    want = op.layer_op.reference((x + 1000.0).double(), None, None, EPS)
    assert (layer_norm(x + 1000.0, None, None, EPS).double() - want).abs().max() < 1e-3


@needs_native
def test_a_weight_of_another_type(level: str) -> None:
    for dtype, other in itertools.permutations(FLOATS, 2):
        dy, x, weight, bias = inputs((5, 75), dtype)
        check("rms", dy, x, weight.to(other), None, offset=1.0)
        check("layer", dy, x, weight.to(other), bias.to(other))


@needs_native
@pytest.mark.parametrize("norm", NORMS)
def test_infinities_and_nan_stay_in_their_rows(level: str, norm: str) -> None:
    dy, x, weight, bias = inputs((4, 40), F32)
    (forward, back), (forward_op, backward_op) = calls(norm, x, weight, bias, EPS, 0.0), OPS[norm]
    want = forward_op.op(*forward), backward_op.op(dy, *back, True, False)[0]
    x[1, 7], x[2, 39] = float("nan"), float("inf")
    got = forward_op.op(*forward), backward_op.op(dy, *back, True, False)[0]
    for mine, clean in zip(got, want, strict=True):
        assert mine[1].isnan().all()
        assert mine[2, 39].isnan()
        assert_same_bits(mine[[0, 3]], clean[[0, 3]])


@needs_native
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_on_one_and_two_threads_and_alone(level: str, norm: str) -> None:
    dy, x, weight, bias = inputs((50, 600), BF16)
    (forward, back), (forward_op, backward_op) = calls(norm, x, weight, bias, EPS, 0.0), OPS[norm]
    runs = []
    for n in (1, 2):
        with threads(n):
            runs.append([forward_op.op(*forward), *backward_op.op(dy, *back, True, True)])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)
    forward, back = calls(norm, x[40:41], weight, bias, EPS, 0.0)
    for whole, one in zip(runs[0], (forward_op.op(*forward), backward_op.op(dy[40:41], *back, True, False)[0]),
                          strict=False):  # fmt: skip
        assert_same_bits(whole[40:41], one)


def _slices(x: Tensor) -> list[Tensor]:
    """The same values [2, 6, 3, 10] in other places: heads of a slice of the features of a wider tensor, tokens of a
    cache, and what has no two distances."""
    wide = torch.cat([x, x, x], -2).view(2, 6, 90)[..., 30:60].view(2, 6, 3, 10)
    every = torch.stack([x, x], 2).view(2, 12, 3, 10)[:, ::2]
    return [wide, x.transpose(1, 2).contiguous().transpose(1, 2), every, torch.cat([every, every], -1)[..., :10],
            x.transpose(0, 3).contiguous().transpose(0, 3)]  # fmt: skip


@needs_native
@pytest.mark.parametrize("norm", NORMS)
def test_strides_and_empty(norm: str) -> None:
    dy, x, weight, bias = inputs((2, 6, 3, 10), F32)
    forward_op, backward_op = OPS[norm]
    want = None
    for view in (x, *_slices(x)):
        forward, back = calls(norm, view, torch.stack([weight, weight], 1)[:, 0], bias, EPS, 0.0)
        given = dy.transpose(0, 1).contiguous().transpose(0, 1)
        got = forward_op.op(*forward), *backward_op.op(given, *back, True, True)
        assert all(t.is_contiguous() for t in got)
        want = want or got
        for mine, right in zip(got, want, strict=True):
            assert_same_bits(mine, right)
    forward, back = calls(norm, x[:0], weight, bias, EPS, 0.0)
    assert forward_op.op(*forward).shape == (0, 6, 3, 10)
    assert not torch.cat(backward_op.op(dy[:0], *back, False, True)).any()


def test_slices_are_not_copied() -> None:
    views = _slices(torch.randn(2, 6, 3, 10))
    assert [with_heads(view)[0] is view for view in views] == [True, False, True, True, False]
    assert with_heads(views[0])[1] == (3, 10, 90)
    assert with_heads(views[0][:, 0])[1] == (3, 10, 540)
    rows = torch.randn(4, 6, 30)[..., 4:14]
    assert with_heads(rows)[1] == (24, 30, 0)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rms": lambda x, weight, bias: rms_norm(x, weight, EPS, 1.0),
    "layer": lambda x, weight, bias: layer_norm(x, weight, bias, EPS),
}


@pytest.mark.parametrize(
    ("norm", "dtype", "trained"), grid(NORMS, FLOATS, [(True, False), (False, True), (True, True)], strength=2), ids=str
)
def test_gradients(norm: str, dtype: torch.dtype, trained: tuple[bool, bool]) -> None:
    """Those that are wanted, also of the weight and the bias; x alone is kept, beside the weight."""
    dy, x, weight, bias = inputs((2, 5, 96), dtype)

    def run(dy: Tensor, *tensors: Tensor) -> list[Tensor]:
        wanted = (*trained, trained[1] and norm == "layer")
        leaves = [t.detach().requires_grad_(on) for t, on in zip(tensors, wanted, strict=True)]
        y = FUNCTIONS[norm](*leaves)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)]

    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = run(dy, x, weight, bias)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}
    with use_backend("reference"):
        eager, exact = run(dy, x, weight, bias), run(*(t.double() for t in (dy, x, weight, bias)))
    for mine, theirs, right in zip(got, eager, exact, strict=True):
        assert_no_worse(mine, theirs, right, right.abs().amax().expand(right.shape))


def test_functions_are_those_of_torch_and_transformers() -> None:
    _, x, weight, bias = inputs((7, 30), torch.float64)
    size, plain = 1 + x.abs() * weight.abs() + bias.abs() + weight.abs(), torch.nn.functional
    for got, want in (
        (layer_norm(x, weight, bias, EPS), plain.layer_norm(x, (30,), weight, bias, EPS)),
        (layer_norm(x, None, None, EPS), plain.layer_norm(x, (30,), None, None, EPS)),
        (rms_norm(x, None, EPS), plain.rms_norm(x, (30,), None, EPS)),
    ):
        assert_no_worse(got, want, want, 4 * size)
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm(30, EPS)
    gemma.weight.data.copy_(weight)
    exact = rms_norm(x.float().double(), weight.float().double(), EPS, 1.0)
    theirs = gemma(x.float()).detach()
    assert_no_worse(theirs, rms_norm(x.float(), weight.float(), EPS, 1.0), exact, size)


@pytest.mark.slow
def test_gradcheck_and_opcheck() -> None:
    _, x, weight, bias = (t.requires_grad_() for t in inputs((3, 4), torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, 1.0), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, EPS), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, EPS), x)
    assert torch.autograd.gradcheck(lambda x, b: layer_norm(x, None, b, EPS), (x, bias))
    dy, x, weight, bias = inputs((3, 4), F32)
    torch.library.opcheck(op.rms_op.op, (x, weight, EPS, 1.0))
    torch.library.opcheck(op.rms_backward_op.op, (dy, x, weight, EPS, 1.0, True, True))
    torch.library.opcheck(op.layer_op.op, (x, weight, bias, EPS))
    torch.library.opcheck(op.layer_backward_op.op, (dy, x, None, EPS, False, True))


@pytest.mark.parametrize("norm", NORMS)
def test_one_graph(norm: str) -> None:
    _, x, weight, bias = inputs((3, 8), F32)
    compiled = torch.compile(lambda x: FUNCTIONS[norm](x, weight, bias), backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    got, want = compiled(x), FUNCTIONS[norm](x, weight, bias)
    assert_same_bits(got, want)
    assert_same_bits(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


def test_bad_input() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[4\], one for each feature of x, got \(3,\)"):
        rms_norm(x, torch.randn(3), EPS)
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \[4\], one for each feature of x, got \(3,\)"):
        layer_norm(x, weight, torch.randn(3), EPS)
    with pytest.raises(TypeError, match=r"rms_norm: x must be a floating-point tensor, got torch\.int64"):
        rms_norm(x.long(), weight, EPS)
    with pytest.raises(TypeError, match=r"rms_norm: weight must be a floating-point tensor, got torch\.int64"):
        rms_norm(x, weight.long(), EPS)
    with pytest.raises(ValueError, match=r"rms_norm: eps must be 0 or above, got -1\.0"):
        rms_norm(x, weight, -1.0)
    with pytest.raises(ValueError, match=r"rms_norm: offset must be finite, and 0 without the weight .*, got 1\.0"):
        rms_norm(x, None, EPS, 1.0)
    with pytest.raises(ValueError, match=r"rms_norm: x must be \[\.\.\., N\], N at least 1, got \(3, 0\)"):
        rms_norm(x[:, :0], weight[:0], EPS)
    with pytest.raises(ValueError, match=r"rms_norm_backward: dy must be torch\.float32 \(3, 4\) on cpu like x"):
        op.rms_backward_op.op(x[:2], x, weight, EPS, 0.0, True, False)


@needs_native
def test_native_takes_one_dtype() -> None:
    x = torch.randn(3, 4)
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"weight is torch\.float64"):
        rms_norm(x, torch.randn(4).double(), EPS)
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"weight and bias are torch\.bfloat16 and"):
        layer_norm(x, x[0].bfloat16(), x[0], EPS)


# ---- Triton: in its interpreter, which is chosen when Triton is imported, so in a process of its own -----------------
@needs_triton
@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@needs_triton
@on_device
@pytest.mark.parametrize(("norm", "dtype"), grid(NORMS, FLOATS), ids=str)
def test_device(norm: str, dtype: torch.dtype) -> None:
    with use_backend("triton"):
        for shape in SHAPES:
            check(norm, *inputs(shape, dtype, device=DEVICE))
        dy, x, weight, bias = inputs((2, 6, 3, 10), dtype, device=DEVICE)
        check(norm, dy, x, weight.float(), bias, offset=1.0)
        check(norm, dy, x, None, None)
        forward = OPS[norm][0].op
        want = forward(*calls(norm, x, weight, bias, EPS, 0.0)[0])
        for view in _slices(x):
            assert_same_bits(forward(*calls(norm, view, weight, bias, EPS, 0.0)[0]), want)
        assert forward(*calls(norm, x[:0], weight, bias, EPS, 0.0)[0]).shape == (0, 6, 3, 10)


@needs_triton
def test_rows_that_no_program_holds_are_refused() -> None:
    x = torch.zeros(1, 16385)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="more than 16384 features"):
        rms_norm(x, x[0], EPS)
