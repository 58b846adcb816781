"""dora_linear: native at every level and the reference against float64; PEFT's formula; gradients; dispatch."""

from __future__ import annotations

import dora_tools
import pytest
import torch
from lora_tools import BF16, F32, FLOATS, level_fixture, make, needs_native, threads
from torch import Tensor

from peft_kernels import dora_linear, dora_norm, lora_linear, philox, use_backend
from peft_kernels.ops import dora_linear as op
from peft_kernels.ops.dora_norm import norm_op as dora_norm_op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

level = level_fixture()


def parts(m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W, a, b, magnitude and bias that want gradients."""
    shapes = ((m, k), (n, k), (r, k), (n, r), (n,), (n,))
    return [(torch.randn(s, dtype=torch.float64) * 0.5).to(dtype).requires_grad_() for s in shapes]


# ---- the reference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_formula_of_peft(p: float) -> None:
    """y = W x + b + (g - 1) W d + g s B A d, with g = m / |W + sBA| (PEFT's result, then the base layer's added)."""
    x, w, a, b, m, bias = parts(5, 4, 6, 2)
    seed, s = torch.tensor([77]), 0.7
    norm = (w + s * b @ a).norm(dim=1)
    g, d = m / norm, x if not p else philox.dropout(x, p, seed)
    want = x @ w.t() + bias + (g - 1) * (d @ w.t()) + g * s * (d @ a.t() @ b.t())
    got = dora_linear(x, w, a, b, m, dora_norm(w, a, b, s), s, bias, p, seed if p else None)
    magnitude = x.abs() @ w.abs().t() * (2 + g.abs()) / (1 - p) + g.abs() * s * (d.abs() @ a.abs().t() @ b.abs().t())
    assert_no_worse(got, want, want, magnitude + bias.abs())


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_the_reference(p: float) -> None:
    """Of everything, also through the norm (the full gradient) and where it is a constant."""
    inputs, seed = parts(3, 4, 5, 2), torch.tensor([5]) if p else None

    def full(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        return dora_linear(x, w, a, b, m, dora_norm(w, a, b, 0.7), 0.7, bias, p, seed)

    norm = dora_norm(*(t.detach() for t in inputs[1:4]), 0.7)

    def constant(x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        return dora_linear(x, w, a, b, m, norm, 0.7, bias, p, seed)

    assert torch.autograd.gradcheck(full, inputs)
    assert torch.autograd.gradcheck(constant, inputs)


def test_no_gain_is_lora() -> None:
    """A magnitude of |W + sBA| leaves LoRA; zero B and the base's norms leave the base."""
    x, w, a, b, _, bias = (t.detach() for t in parts(6, 5, 7, 3))
    norm = dora_norm(w, a, b, 1.5)
    size = x.abs() @ (w.abs() + 1.5 * b.abs() @ a.abs()).t() + bias.abs()
    want = lora_linear(x, w, a, b, 1.5, bias)
    assert_no_worse(dora_linear(x, w, a, b, norm, norm, 1.5, bias), want, want, size)
    zero, plain = torch.zeros_like(b), torch.nn.functional.linear(x, w, bias)
    assert_no_worse(dora_linear(x, w, a, zero, w.norm(dim=1), dora_norm(w, a, zero), 1.0, bias), plain, plain, size)


def test_opcheck() -> None:
    for quant, p in (("dense", 0.0), ("nf4", 0.3)):
        c = make(3, 8, 64, quant=quant, r=2, p=p, bias=True)
        gain = dora_tools.make_gain(8)
        with use_backend("reference"):
            calls: list[tuple[object, ...]] = []
            for fn in (op.forward_op, op.backward_op):
                record = lambda *args: calls.append(args) or fn.reference(*args)  # noqa: B023, E731
                if fn is op.forward_op:
                    _, h, s = dora_tools.forward(c, gain, record)
                else:
                    dora_tools.backward(c, gain, h, s, record)
                torch.library.opcheck(fn.op, calls[-1])
            torch.library.opcheck(op.normed_op.op, dora_tools.forward(c, gain, lambda *args: args))


def test_bad_input() -> None:
    x, w, a, b, m, _ = (t.detach() for t in parts(3, 4, 5, 2))
    norm = dora_norm(w, a, b)
    with pytest.raises(ValueError, match=r"dora_linear: x must be \[\.\.\., 5\] to fit the weight \[4, 5\]"):
        dora_linear(x[:, :4], w, a, b, m, norm)
    with pytest.raises(ValueError, match=r"dora_linear: magnitude must be of 4 elements, got \(3,\)"):
        dora_linear(x, w, a, b, m[:3], norm)
    with pytest.raises(ValueError, match=r"dora_linear: norm must be \[4\], got \(3,\)"):
        dora_linear(x, w, a, b, m, norm[:3])
    with pytest.raises(ValueError, match=r"dora_linear: b must be \[4, 2\]"):
        dora_linear(x, w, a, b[:3], m, norm)
    with pytest.raises(ValueError, match="dora_linear: dropout_p must be in"):
        dora_linear(x, w, a, b, m, norm, dropout_p=1.0)
    with pytest.raises(TypeError, match=r"dora_linear: gain must be torch\.float32 for x in torch\.bfloat16"):
        op.forward_op.op(x.bfloat16(), w, *[None] * 4, 0, 64, 256, 4, a, b, m, 1.0, None, 0.0, None, False)


def test_dense_weights_and_magnitudes_train_under_autocast() -> None:
    x, w, a, b, m, bias = parts(6, 5, 8, 2, F32)
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(x, w, a, b, m, dora_norm(w, a, b), 1.0, bias, 0.1)
    assert y.dtype is BF16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype is F32 and t.grad.abs().sum() > 0 for t in (x, w, a, b, m, bias))


# ---- native: M picks the kernel (GEMV, codes in registers, panels), N and K its edges ------------------------------
@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 4, 5, 33, 97, 130])
def test_quantised(level: str, m: int, dtype: torch.dtype) -> None:
    for i, (n, k) in enumerate(((64, 64), (50, 192), (7, 1088), (130, 576))):
        quant, blocksize = ("nf4", 64) if i % 2 == 0 else ("fp4", 32)
        gain = dora_tools.make_gain(n)
        kind = {"dtype": dtype, "quant": quant, "blocksize": blocksize}
        dora_tools.check(make(m, n, k, **kind, nested=True, r=16, bias=True), gain)
        dora_tools.check(make(m, n, k, **kind, r=4, p=0.25, bias=i % 2 == 0), gain)


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dense_and_straddling(level: str, dtype: torch.dtype) -> None:
    for i, (m, n, k) in enumerate(((1, 33, 70), (4, 5, 600), (7, 49, 65), (130, 51, 97), (260, 64, 128), (9, 13, 15))):
        quant = "dense" if i < 4 else "nf4"
        for p in (0.0, 0.05, 0.9):
            c = make(m, n, k, dtype=dtype, quant=quant, w_dtype=FLOATS[i % 3], r=3, ab=FLOATS[i % 3], p=p)
            dora_tools.check(c, dora_tools.make_gain(n))


@needs_native
def test_many_rows_and_deep_panels(level: str) -> None:
    for dtype, quant, m, k in ((F32, "nf4", 520, 1088), (BF16, "nf4", 130, 1088), (BF16, "dense", 520, 900)):
        c = make(m, 50, k, dtype=dtype, quant=quant, r=8, p=0.1, bias=True)
        dora_tools.check(c, dora_tools.make_gain(50))


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("m", [3, 40, 200])
def test_same_bits_on_one_and_two_threads_and_again(level: str, m: int, p: float, dtype: torch.dtype) -> None:
    c, gain = make(m, 200, 576, dtype=dtype, r=16, p=p, nested=True, bias=True), dora_tools.make_gain(200)
    runs = []
    for n in (1, 2, 2):
        with threads(n):
            y, h, s = dora_tools.forward(c, gain, op.forward_op.op)
            runs.append((y, h, s, *dora_tools.backward(c, gain, h, s, op.backward_op.op)))
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert_same_bits(got, want)


@needs_native
def test_a_gain_of_one_is_lora_linear(level: str) -> None:
    """The same kernels: without dropout the same bits, of the gradients too."""
    from peft_kernels.ops import lora_linear as lora

    for m in (2, 20, 140):
        c, one = make(m, 60, 192, r=4), torch.ones(60)
        y, h, s = dora_tools.forward(c, one, op.forward_op.op)
        plain, plain_s = c.forward(lora.forward_op.op)
        assert_same_bits(y, plain)
        assert_same_bits(h, plain)
        grads = dora_tools.backward(c, one, h, s, op.backward_op.op)
        for got, want in zip(grads, c.backward(lora.backward_op.op, plain_s), strict=False):
            assert_same_bits(got, want)


@needs_native
def test_normed_is_the_norm_and_then_the_layer(level: str) -> None:
    """One call, the same bits as two, and of `trained` the same gradients."""
    cases = ((130, 64, 576, F32, "nf4", 0.0), (9, 50, 97, F32, "dense", 0.0), (1, 7, 64, BF16, "fp4", 0.3))
    for m, n, k, dtype, quant, p in cases:
        c, magnitude = make(m, n, k, dtype=dtype, quant=quant, r=3, p=p, bias=True), dora_tools.make_gain(n)
        c.b[n // 3] = 0.0  # a row without an update; of a dense weight a row of zeros
        if quant == "dense":
            c.weight[0][n // 3] = 0.0
        y, h, s, gain, norm = dora_tools.forward(c, magnitude, op.normed_op.op)
        assert_same_bits(norm, dora_norm_op.op(*dora_tools.norm_args(c)).clamp_min(torch.finfo(F32).tiny))
        assert_same_bits(gain, magnitude / norm)
        for got, want in zip((y, h, s), dora_tools.forward(c, gain, op.forward_op.op), strict=True):
            assert_same_bits(got, want)
    w, *train = (t.detach() for t in (torch.randn(8, 64), *parts(5, 8, 64, 2, F32)[:1], *parts(5, 8, 64, 2, F32)[2:5]))
    x, a, b, magnitude = (t.requires_grad_() for t in train)
    want = dora_linear(x, w, a, b, magnitude, dora_norm(w, a.detach(), b.detach(), 0.7), 0.7)
    ys = (op.dora_linear_normed(x, w, a, b, magnitude, 0.7, None, 0.0), want)
    for got, two in zip(*(torch.autograd.grad(y.square().sum(), (x, a, b, magnitude)) for y in ys), strict=True):
        assert_same_bits(got, two)


@needs_native
def test_no_rows_and_what_is_not_needed(level: str) -> None:
    c, gain = make(0, 20, 64, r=4, bias=True), dora_tools.make_gain(20)
    y, h, s = dora_tools.forward(c, gain, op.forward_op.op)
    assert (y.shape, h.shape, s.shape) == ((0, 20), (0, 20), (0, 4))
    dx, da, db, dgain = dora_tools.backward(c, gain, h, s, op.backward_op.op)
    assert dx.shape == (0, 64)
    for got, shape in ((da, (4, 64)), (db, (20, 4)), (dgain, (20,))):
        assert torch.equal(got, torch.zeros(shape))  # 0 or -0: a gain may be negative
    c = make(9, 20, 64, r=4, p=0.2)
    _, h, s = dora_tools.forward(c, gain, op.forward_op.op)
    whole = dora_tools.backward(c, gain, h, s, op.backward_op.op)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        some = op.backward_op.op(c.dy, c.x, *c.weight, c.a, c.b, gain, h, s, c.scaling, c.p, c.seed, *needs)
        for got, want, needed in zip(some, whole, (needs[0], needs[1], needs[1], needs[2]), strict=True):
            assert_same_bits(got, want if needed else want.new_empty((0,)))


@needs_native
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiled_and_eager_agree(p: float) -> None:
    packed = random_quant_weight(24, 64, nested=True)
    x, a, b, m = (torch.randn(s, requires_grad=True) for s in ((6, 64), (3, 64), (24, 3), (24,)))
    seed = torch.tensor([9])

    def run(*t: Tensor) -> Tensor:
        if not p:
            return op.dora_linear_normed(t[0], packed, *t[1:], 0.5, None, p)
        norm = dora_norm(packed, t[1].detach(), t[2].detach(), 0.5)
        return dora_linear(t[0], packed, *t[1:], norm, 0.5, None, p, seed)

    eager = run(x, a, b, m)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, a, b, m)
    assert_same_bits(compiled, eager)
    for got, want in zip(*(torch.autograd.grad(y.sum(), (x, a, b, m)) for y in (compiled, eager)), strict=True):
        assert_same_bits(got, want)
