"""lora_linear on the native CPU library at every level, and the reference, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_draws import draw_case
from lora_tools import BF16, F32, FLOATS, LEVELS, at_level, check, level_fixture, make, needs_native, threads
from torch import Tensor

from peft_kernels import QuantWeight, lora_linear, native, philox, use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.ops import lora_linear as op
from peft_kernels.ops.lora_linear.native import pack
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

level = level_fixture()


# ---- shapes: M picks the kernel (GEMV, codes in registers, panels), N and K its edges -------------------------------
ROWS = (1, 2, 3, 4, 5, 16, 33, 97, 130)
SHAPES = ((64, 64), (50, 192), (7, 1088), (1, 96), (130, 576))


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_quantised(level: str, m: int, dtype: torch.dtype) -> None:
    for i, (n, k) in enumerate(SHAPES):
        quant, blocksize = ("nf4", 64) if i % 2 == 0 else ("fp4", 32)
        check(make(m, n, k, dtype=dtype, quant=quant, blocksize=blocksize, nested=True))
        check(make(m, n, k, dtype=dtype, quant=quant, blocksize=blocksize, r=16, p=0.25, bias=True))


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 4, 6, 40])
def test_blocks_and_bytes_that_straddle_rows(level: str, m: int, dtype: torch.dtype) -> None:
    for n, k in ((5, 1), (13, 15), (50, 77), (9, 1000), (33, 100)):
        check(make(m, n, k, dtype=dtype, nested=True, r=3, p=0.1))


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_columns(level: str, dtype: torch.dtype) -> None:
    """x [M, 0]: y is the bias and the gradient of b is zero, whatever was in the memory before."""
    with threads(1):
        for m, quant in ((1, "nf4"), (5, "nf4"), (20, "nf4"), (130, "nf4"), (5, "dense"), (20, "dense")):
            make(m, 130, 128, dtype=dtype, quant=quant, r=4).forward(op.forward_op.op)  # leaves numbers behind
            c = make(m, 130, 0, dtype=dtype, quant=quant)
            assert not c.forward(op.forward_op.op)[0].any()
            a, b, s, ones = torch.empty(4, 0), torch.randn(130, 4), torch.zeros(m, 4), torch.ones(130, 4)
            packed = pack(1, c.x, *c.weight, 130, a, b, 1.0, None, 0.0, None, s=s, dy=c.dy, da=a, db=ones)
            native.check(native.cpu().pk_cpu_lora_linear_backward(packed, 1))
            assert not ones.any()


@needs_native
@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dense(level: str, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    for m, n, k in ((1, 33, 70), (4, 5, 600), (7, 49, 65), (130, 51, 96), (260, 64, 128)):
        check(make(m, n, k, dtype=dtype, quant="dense", w_dtype=w_dtype, r=4, ab=F32, bias=True))


@needs_native
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_blocksizes(level: str, blocksize: int) -> None:
    for dtype in (F32, BF16):
        for m in (1, 6, 100):
            check(make(m, 20, 4096 + (0 if blocksize > 512 else blocksize), dtype=dtype, blocksize=blocksize,
                       nested=True))  # fmt: skip


@needs_native
@pytest.mark.parametrize("r", [1, 5, 16, 37, 512])
@pytest.mark.parametrize("ab", FLOATS, ids=str)
def test_ranks(level: str, r: int, ab: torch.dtype) -> None:
    for m in (2, 9):
        check(make(m, 65, 128, dtype=BF16, r=r, ab=ab, p=0.5))


@needs_native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    m, k = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 320))
    case = draw_case(data, m, k, data.draw(st.sampled_from(FLOATS)))
    with at_level(data.draw(st.sampled_from(LEVELS))):
        check(case)


# ---- empty ----------------------------------------------------------------------------------------------------------
@needs_native
def test_no_rows(level: str) -> None:
    c = make(0, 20, 64, r=4, bias=True)
    y, s = c.forward(op.forward_op.op)
    assert y.shape == (0, 20)
    assert s.shape == (0, 4)
    dx, da, db = c.backward(op.backward_op.op, s)
    assert dx.shape == (0, 64)
    assert_same_bits(da, torch.zeros(4, 64))  # a sum over nothing
    assert_same_bits(db, torch.zeros(20, 4))


# ---- determinism ----------------------------------------------------------------------------------------------------
@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 576), (4, 576), (16, 576), (16, 1088), (128, 576), (600, 576)])
def test_same_bits_on_one_and_two_threads_and_again(level: str, m: int, k: int, dtype: torch.dtype) -> None:
    c = make(m, 200, k, dtype=dtype, r=16, p=0.1, nested=True, bias=True)
    runs = []
    for n in (1, 2, 2):
        with threads(n):
            y, s = c.forward(op.forward_op.op)
            runs.append((y, s, *c.backward(op.backward_op.op, s)))
    for other in runs[1:]:
        for got, want in zip(other, runs[0], strict=True):
            assert_same_bits(got, want)


# ---- dropout --------------------------------------------------------------------------------------------------------
@needs_native
@pytest.mark.parametrize(("m", "k"), [(1, 64), (5, 63), (40, 70), (3, 1), (9, 129)])
def test_drops_what_the_reference_drops(level: str, m: int, k: int) -> None:
    p, seed = 0.3, torch.tensor([-(2**62) + 12345])
    a = torch.eye(k)  # then s is the dropped x itself
    x = torch.ones(m, k)
    w = torch.zeros(1, k)
    _, s = op.forward_op.op(x, w, None, None, None, None, 0, 64, 256, 1, a, torch.zeros(1, k), 1.0, None, p, seed)
    keep = philox.keep_mask(m, k, p, seed)
    assert_same_bits(s, torch.where(keep, torch.tensor(1 / (1 - p), dtype=F32), torch.tensor(0.0)))
    # the backward drops the same: dx = drop'(ds a) with ds = dy b
    b, dy = torch.ones(1, k), torch.ones(m, 1)
    dx, _, _ = op.backward_op.op(dy, x, w, None, None, None, None, 0, 64, 256, a, b, s, 1.0, p, seed, True, True)
    assert_same_bits(dx, s)


# ---- the public function --------------------------------------------------------------------------------------------
def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@needs_native
@pytest.mark.parametrize("quant", ["nf4", "dense"])
def test_gradients_of_the_public_function(level: str, quant: str) -> None:
    c = make(12, 40, 64, dtype=BF16, quant=quant, r=8, p=0.2, bias=True)
    qw = random_quant_weight(40, 64)
    grads = {}
    for name in ("native", "reference"):
        with use_backend(name):
            x, a, b, bias = leaves(c.x, c.a, c.b, c.bias)
            w = qw if quant == "nf4" else c.weight[0]
            y = lora_linear(x.reshape(3, 4, 64), w, a, b, 0.5, bias, 0.2, torch.tensor([7]))
            y.backward(c.dy.reshape(3, 4, 40))
            grads[name] = (y.reshape(12, 40), x.grad, a.grad, b.grad, bias.grad)
    x, a, b, bias = leaves(c.x.double(), c.a.double(), c.b.double(), c.bias.double())
    w = qw if quant == "nf4" else c.weight[0].double()
    with use_backend("reference"):
        y = lora_linear(x, w, a, b, 0.5, bias, 0.2, torch.tensor([7]))
        y.backward(c.dy.double())
    exact = (y.detach(), x.grad, a.grad, b.grad, bias.grad)
    for got, eager, want in zip(grads["native"], grads["reference"], exact, strict=True):
        # what rounding scales with: the largest element bounds the sum of magnitudes from below
        assert_no_worse(got.detach(), eager.detach(), want, want.abs().max().expand_as(want))


@needs_native
def test_x_of_any_rank_and_stride(level: str) -> None:
    qw = random_quant_weight(24, 64)
    flat = torch.randn(30, 64)
    want = lora_linear(flat, qw)
    assert_same_bits(lora_linear(flat.reshape(2, 3, 5, 64), qw), want.reshape(2, 3, 5, 24))
    assert_same_bits(lora_linear(flat.t().contiguous().t(), qw), want)
    assert_same_bits(lora_linear(torch.cat([flat, flat], 1)[:, :64], qw), want)
    one = lora_linear(flat[0], qw)
    assert one.shape == (24,)
    assert_same_bits(one, lora_linear(flat[:1], qw)[0])


@needs_native
def test_adapter_tensors_of_any_stride(level: str) -> None:
    c = make(6, 24, 64, r=8)
    want = c.forward(op.forward_op.op)
    c.a, c.b = c.a.t().contiguous().t(), c.b.t().contiguous().t()
    got = c.forward(op.forward_op.op)
    assert_same_bits(got[0], want[0])
    for t, u in zip(c.backward(op.backward_op.op, got[1]), make(6, 24, 64, r=8).backward(op.backward_op.op, want[1]),
                    strict=True):  # fmt: skip
        assert_same_bits(t, u)


@needs_native
def test_one_gradient_without_the_other(level: str) -> None:
    c = make(9, 40, 128, dtype=BF16, r=4, p=0.1)
    _, s = c.forward(op.forward_op.op)
    dx, da, db = c.backward(op.backward_op.op, s)
    args = (c.dy, c.x, *c.weight, c.a, c.b, s, c.scaling, c.p, c.seed)
    only_dx = op.backward_op.op(*args, True, False)
    only_ab = op.backward_op.op(*args, False, True)
    assert_same_bits(only_dx[0], dx)
    assert_same_bits(only_ab[1], da)
    assert_same_bits(only_ab[2], db)
    assert only_dx[1].numel() == only_dx[2].numel() == only_ab[0].numel() == 0


@needs_native
@pytest.mark.parametrize("m", [1, 9])
def test_opcheck(m: int) -> None:
    c = make(m, 24, 64, r=4, p=0.1, bias=True)
    with use_backend("native"):
        args = (c.x, *c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)
        torch.library.opcheck(op.forward_op.op, args)
        s = op.forward_op.op(*args)[1]
        torch.library.opcheck(
            op.backward_op.op, (c.dy, c.x, *c.weight, c.a, c.b, s, c.scaling, c.p, c.seed, True, True)
        )


# ---- what it does not serve -----------------------------------------------------------------------------------------
@needs_native
def test_float64_is_left_to_the_reference() -> None:
    x, w = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    with use_backend("native"), pytest.raises(BackendUnavailable, match="float64"):
        lora_linear(x, w)
    torch.testing.assert_close(lora_linear(x, w), x @ w.t(), rtol=0, atol=0)


@needs_native
def test_a_float64_adapter_is_refused_with_its_name() -> None:
    c = make(3, 8, 64, r=2, ab=torch.float64)
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"does not serve a in torch\.float64"):
        lora_linear(c.x, QuantWeight(c.weight[0], c.weight[1], (8, 64)), c.a, c.b)
