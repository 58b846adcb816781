"""CUDA backend of lora_linear: the host build of its sources (csrc/simt); the same tests on a GPU where there is one.

The kernels' paths: up to 8 rows on rows of whole 32 codes (one or two sets of columns, blocks of the format shared by
1, 2 or 4 lanes, rows of W split over blocks or not) or element by element; the backward up to 64 rows in tiles of 16,
32 and 64, in one of 32 where 64 columns have two scales or dy has no alignment, or element by element.
"""

from __future__ import annotations

import itertools
import runpy
from ctypes import byref, c_int64
from pathlib import Path

import pytest
import torch
from lora_tools import BF16, F16, F32, FLOATS, Case, check, make
from torch import Tensor

from peft_kernels import explain, native, philox, quantize_4bit, use_backend
from peft_kernels.ops import lora_linear as op
from peft_kernels.ops.lora_linear import cuda
from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed, device = (tools[name] for name in ("simt", "races", "seed", "device"))
HALVES = (BF16, F16)


def run(c: Case) -> tuple[Tensor, ...]:
    """Everything that a forward and a backward return, from the backward's own kernels where the forward has none."""
    forward = "cuda" if c.x.shape[0] <= cuda.ROWS else "reference"
    with use_backend(lora_linear=forward, lora_linear_backward="cuda"):
        y, s = c.forward(op.forward_op.op)
        return y, s, *c.backward(op.backward_op.op, s if c.a is not None else None)


def check_backward(c: Case) -> None:
    with use_backend(lora_linear="reference", lora_linear_backward="cuda"):
        check(c)


# ---- against float64 -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8])
def test_few_rows(device: str, m: int, dtype: torch.dtype) -> None:
    for i, (n, k) in enumerate([(64, 128), (52, 192), (7, 1088), (1, 96), (33, 32), (132, 640)]):
        quant, blocksize = (("nf4", 64), ("fp4", 32), ("nf4", 128))[i % 3]
        check(make(m, n, k, dtype=dtype, quant=quant, blocksize=blocksize, nested=True).to(device))
        c = make(m, n, k, dtype=dtype, quant=quant, blocksize=blocksize, r=16, ab=FLOATS[i % 3], p=0.25, bias=True)
        check(c.to(device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 6])
def test_any_shape(device: str, m: int, dtype: torch.dtype) -> None:
    """Rows that start within a byte, a word or a block; columns of W that fill no vector."""
    for n, k in ((5, 1), (13, 15), (50, 77), (9, 1000), (36, 100), (8, 104), (4, 40)):
        check(make(m, n, k, dtype=dtype, nested=True, r=3, p=0.1, bias=True).to(device))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_blocksizes(device: str, blocksize: int) -> None:
    """Rows of whole blocks; then blocks that straddle rows of whole runs of 32, 64 and 128 codes."""
    for m, nested in ((1, True), (7, False)):
        for k in (blocksize, 32 * 3, 64 * 5, 128 * 3):
            check(make(m, 12, k, dtype=BF16, blocksize=blocksize, nested=nested).to(device))


@pytest.mark.parametrize("m", [1, 4, 8])
def test_rows_of_w_are_split(device: str, m: int) -> None:
    """Few rows of W: several blocks share one, and another kernel adds up."""
    for k in (2080, 4096):
        c = make(m, 40, k, dtype=BF16, nested=True, r=8, bias=True).to(device)
        assert workspace(c) > 0
        check(c)


@pytest.mark.parametrize("r", [1, 5, 37, 256])
@pytest.mark.parametrize("ab", FLOATS, ids=str)
def test_ranks(device: str, r: int, ab: torch.dtype) -> None:
    for m, dtype in ((1, F16), (3, BF16)):
        check(make(m, 36, 128, dtype=dtype, r=r, ab=ab, p=0.5).to(device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [9, 16, 17, 40, 64])
def test_backward_of_more_rows(device: str, m: int, dtype: torch.dtype) -> None:
    cases = [(64, 320, "nf4", 64), (20, 96, "fp4", 32), (7, 77, "nf4", 64), (1, 40, "nf4", 64), (328, 64, "nf4", 256)]
    for n, k, quant, blocksize in cases:
        c = make(m, n, k, dtype=dtype, quant=quant, blocksize=blocksize, nested=True)
        c.dy = c.dy * 2**-12  # float16 has numbers as small as these, but not as their products with scales
        check_backward(c.to(device))
        c = make(m, n, k, dtype=dtype, quant=quant, blocksize=blocksize, r=6, p=0.25)
        check_backward(c.to(device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [16, 64])
def test_dy_with_a_mean(device: str, m: int, dtype: torch.dtype) -> None:
    """Where all of dy is positive, errors of weights that depend on the code add up; eager's do not. N is split."""
    c = make(m, 2048, 64, dtype=dtype).to(device)
    c.dy = c.dy.abs()
    c.weight = quantize_4bit(torch.randn(2048, 64, device=device) * 0.02, "nf4", blocksize=64).flatten()
    got = c.backward(op.backward_op.op, None)[0]
    with use_backend("reference"):
        eager, exact = c.backward(op.backward_op.op, None)[0], c.double().backward(op.backward_op.op, None)[0]
    ours, theirs = ((dx.double() - exact).square().mean().sqrt() for dx in (got, eager))
    assert ours < 2 * theirs


@pytest.mark.parametrize("offset", [1, 3])
def test_storage_that_starts_anywhere(device: str, offset: int) -> None:
    """Views into larger buffers: nothing is aligned to a vector."""

    def shifted(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)[offset:].view(t.shape).copy_(t)

    for m in (2, 8):
        c = make(m, 36, 128, dtype=BF16, r=4, p=0.2, bias=True).to(device)
        c.x, c.dy, c.a, c.b = shifted(c.x), shifted(c.dy), shifted(c.a), shifted(c.b)
        check(c)
        c.weight = (shifted(c.weight[0]), *c.weight[1:])
        check(c)


def test_a_broken_scale_stays_in_its_row(device: str) -> None:
    for value, k in itertools.product((float("nan"), float("inf")), (160, 192)):
        c = make(5, 40, k, dtype=BF16, blocksize=32).to(device)
        want = c.forward(op.forward_op.op)[0]
        c.weight[1][17 * k // 32 + k // 32 - 1] = value  # the last block of row 17
        got = c.forward(op.forward_op.op)[0]
        assert not got[:, 17].isfinite().any()
        others = [n for n in range(40) if n != 17]
        assert_same_bits(got[:, others], want[:, others])


@pytest.mark.parametrize("blocksize", [32, 64])
def test_a_broken_scale_stays_in_its_columns(device: str, blocksize: int) -> None:
    for value, row in itertools.product((float("nan"), float("inf")), (17, 39)):  # 39 is the last one
        c = make(5, 40, 192, dtype=BF16, blocksize=blocksize).to(device)
        want = c.backward(op.backward_op.op, None)[0]
        block = 192 // blocksize - 1
        c.weight[1][row * 192 // blocksize + block] = value
        got = c.backward(op.backward_op.op, None)[0]
        assert not got[:, block * blocksize :].isfinite().any()
        assert_same_bits(got[:, : block * blocksize], want[:, : block * blocksize])


# ---- dropout ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("m", "k"), [(1, 64), (5, 63), (7, 70), (3, 1), (8, 136)])
def test_drops_what_the_reference_drops(device: str, m: int, k: int) -> None:
    p, seed = 0.3, torch.tensor([-(2**62) + 12345], device=device)
    c = make(m, 4, k, dtype=BF16, r=k, p=p).to(device)
    c.x, c.a, c.b, c.seed = torch.ones_like(c.x), torch.eye(k, device=device), torch.ones_like(c.b), seed
    _, s = c.forward(op.forward_op.op)  # s is the dropped x itself
    keep = philox.keep_mask(m, k, p, seed, device)
    kept = torch.where(keep, torch.tensor(1 / (1 - p), dtype=F32, device=device), torch.tensor(0.0, device=device))
    assert_same_bits(s, kept)
    # the backward drops the same: da = ds^T drop(x), and dx = drop'(ds a) where W is nothing
    c.weight[1].zero_()
    c.dy = torch.ones_like(c.dy)
    dx, da, _ = c.backward(op.backward_op.op, s)
    assert_same_bits(dx != 0, keep)
    assert_same_bits(da != 0, keep.any(0).expand(k, k))


# ---- the same bits ---------------------------------------------------------------------------------------------------
SAME = [(1, 40, 2080, 64), (3, 52, 192, 32), (8, 36, 100, 64), (8, 64, 256, 64), (40, 72, 192, 64)]


@pytest.mark.parametrize(("m", "n", "k", "blocksize"), SAME)
def test_again(device: str, m: int, n: int, k: int, blocksize: int) -> None:
    c = make(m, n, k, dtype=BF16, blocksize=blocksize, r=9, p=0.1, nested=True, bias=True).to(device)
    first = run(c)
    for got, want in zip(run(c), first, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize(("m", "n", "k", "blocksize"), SAME)
def test_in_any_order_of_threads(simt, seed: int, m: int, n: int, k: int, blocksize: int) -> None:
    c = make(m, n, k, dtype=F16, blocksize=blocksize, r=9, p=0.1, nested=True, bias=True)
    simt.pk_simt_set_seed(0)
    first = run(c)
    simt.pk_simt_set_seed(seed + 1)
    for got, want in zip(run(c), first, strict=True):
        assert_same_bits(got, want)


RACES = [(1, 33, 160, 64), (5, 36, 64, 32), (3, 5, 23, 64), (2, 40, 2048, 64)]


@pytest.mark.parametrize(("m", "n", "k", "blocksize"), RACES)
def test_no_races(races, m: int, n: int, k: int, blocksize: int) -> None:
    for order, nested in ((1, False), (2, True)):
        races.pk_simt_set_seed(order)
        run(make(m, n, k, dtype=BF16, blocksize=blocksize, r=5, p=0.1, nested=nested, bias=True))


def test_no_races_in_the_backward(races) -> None:
    for order, m, n in ((3, 17, 20), (4, 40, 72), (5, 9, 328)):
        races.pk_simt_set_seed(order)
        run(make(m, n, 128, dtype=BF16, r=5, p=0.1, nested=True))


@pytest.mark.slow
def test_nothing_out_of_bounds() -> None:
    one_of_each = "(simt-3- or simt-6- or simt-8 or simt-17- or simt-64-) and torch.bfloat16 or split and simt-8"
    tools["under_asan"](__file__, "-k", f"({one_of_each}) or anywhere or nothing_of")


# ---- empty, and in part ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(0, 20, 64, 4), (3, 0, 64, 4), (3, 20, 0, 4), (3, 20, 64, 0), (0, 0, 0, 0)]
)
def test_nothing_of_something(device: str, m: int, n: int, k: int, r: int) -> None:
    c = make(m, n, k, dtype=BF16, r=1, p=0.5, bias=True).to(device)
    c.a, c.b = c.a[:1].expand(r, k).contiguous(), c.b[:, :1].expand(n, r).contiguous()
    with use_backend("reference"):
        y, s = c.forward(op.forward_op.op)
        want = (y, s, *c.backward(op.backward_op.op, s))
    for i, (got, expected) in enumerate(zip(run(c), want, strict=True)):
        assert got.shape == expected.shape
        if 0 in (m, n, k) and (i != 1 or k == 0):  # all but s are sums over nothing; + 0.0: they may be -0.0
            assert_same_bits(got + 0.0, expected + 0.0)
    check(c)


@pytest.mark.parametrize("m", [4, 20])
def test_one_gradient_without_the_other(device: str, m: int) -> None:
    c = make(m, 40, 128, dtype=BF16, r=4, p=0.1).to(device)
    _, s, dx, da, db = run(c)
    args = (c.dy, c.x, *c.weight, c.a, c.b, s, c.scaling, c.p, c.seed)
    only_dx, only_ab = op.backward_op.op(*args, True, False), op.backward_op.op(*args, False, True)
    assert_same_bits(only_dx[0], dx)
    assert_same_bits(only_ab[1], da)
    assert_same_bits(only_ab[2], db)
    assert only_dx[1].numel() == only_dx[2].numel() == only_ab[0].numel() == 0


def test_opcheck(device: str) -> None:
    c = make(3, 24, 64, dtype=BF16, r=4, p=0.1, bias=True).to(device)
    tests = ("test_schema", "test_faketensor")
    args = (c.x, *c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)
    torch.library.opcheck(op.forward_op.op, args, test_utils=tests)
    s = op.forward_op.op(*args)[1]
    args = (c.dy, c.x, *c.weight, c.a, c.b, s, c.scaling, c.p, c.seed, True, True)
    torch.library.opcheck(op.backward_op.op, args, test_utils=tests)


# ---- what it does not serve ------------------------------------------------------------------------------------------
def reasons(c: Case) -> tuple[str, str]:
    """Why the backend does not serve the forward and the backward of a call; "chosen" where it does."""
    args = (c.x, *c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)
    s = None if c.a is None else torch.empty(c.x.shape[0], c.a.shape[0])
    grads = (c.dy, c.x, *c.weight, c.a, c.b, s, c.scaling, c.p, c.seed, True, c.a is not None)
    return explain("lora_linear", *args)["cuda"], explain("lora_linear_backward", *grads)["cuda"]


def test_reasons(simt) -> None:
    with use_backend("cuda"):
        assert reasons(make(8, 8, 64, dtype=BF16, r=2)) == ("chosen", "chosen")
        assert reasons(make(513, 8, 64, dtype=BF16))[0] == "serves up to 512 rows of x, these are 513"
        assert reasons(make(65, 8, 64, dtype=BF16))[1] == "serves up to 64 rows of x, these are 65"
        for c, text in (
            (make(1, 8, 64), "does not serve torch.float32"),
            (make(1, 8, 64, dtype=BF16, quant="dense"), "serves 4-bit weights only, this one is dense"),
            (make(1, 8, 64, dtype=BF16, r=2, ab=torch.float64), "does not serve a in torch.float64"),
        ):
            assert all(why.startswith(text) for why in reasons(c)), reasons(c)
        c = make(1, 8, 64, dtype=BF16, nested=True)
        c.weight = (*c.weight[:7], 96)
        assert "nested blocksizes that are powers of two, this one is 96" in reasons(c)[0]


def workspace(c: Case) -> int:
    own, y, s = cuda.forward_arguments(c.x, *c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)
    needed = c_int64(-1)
    packed = cuda.with_tail(cuda.pack(0, c.x, *own, y=y, s=s), own[5])
    native.check(native.cuda().pk_cuda_lora_workspace(packed, False, byref(needed)), "cuda")
    return needed.value


def test_errors_name_what_came(simt) -> None:
    c = make(1, 40, 4096, dtype=BF16, r=2, p=0.5)
    own, y, s = cuda.forward_arguments(c.x, *c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)

    def call(*changed: object, x: Tensor = c.x, tail: tuple[int, int] = (0, 0), device: int = 0) -> None:
        packed = cuda.pack(0, x, *(changed or own), y=y, s=s)
        native.check(simt.pk_cuda_lora_linear(cuda.with_tail(packed, own[5], *tail), device, None), "cuda")

    def using(i: int, value: object) -> tuple:
        return (*own[:i], value, *own[i + 1 :])

    needed = workspace(c)
    with pytest.raises(native.NativeError, match=rf"needs {needed} bytes of workspace, 16-byte aligned; got 0"):
        call()
    with pytest.raises(native.NativeError, match=rf"needs {needed} bytes .*; got {needed - 4}"):
        call(tail=(y.data_ptr() & ~15, needed - 4))
    with pytest.raises(native.NativeError, match="x_dtype must be bfloat16 or float16, got 0"):
        call(x=c.x.float())
    with pytest.raises(native.NativeError, match="M must be at most 512, got 513"):
        call(x=c.x.expand(513, -1))
    with pytest.raises(native.NativeError, match="the weight must be NF4, FP4 or int4, got 0"):
        call(*using(5, 0))
    with pytest.raises(native.NativeError, match="blocksize must be a power of two from 32 to 4096, got 48"):
        call(*using(6, 48))
    with pytest.raises(native.NativeError, match=r"dropout needs a seed and p in \[0, 1\), got p 1.5"):
        call(*using(13, 1.5))
    with pytest.raises(native.NativeError, match="dropout needs a seed"):
        call(*using(14, None))
    room = torch.empty(needed + 16, dtype=torch.uint8)
    with pytest.raises(native.NativeError, match=r"lora_linear: .*\(cudaErrorNoDevice\)"):
        call(tail=((room.data_ptr() + 15) & ~15, needed), device=7)


# ---- on a GPU only ---------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8])
def test_in_a_cuda_graph(m: int) -> None:
    """Forward and backward, recorded once; replayed on other inputs they give what direct calls give."""
    c = make(m, 1024, 2048, dtype=BF16, r=16, p=0.1, nested=True, bias=True).to("cuda")
    other = make(m, 1024, 2048, dtype=BF16, r=16, p=0.1, nested=True, bias=True, seed=5).to("cuda")
    run(c)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(c)
    for name in ("x", "dy", "a", "b", "bias", "seed"):
        getattr(c, name).copy_(getattr(other, name))
    graph.replay()
    for got, want in zip(recorded, run(c), strict=True):
        assert_same_bits(got, want)


@pytest.mark.gpu
def test_on_another_stream() -> None:
    c = make(4, 4096, 4096, dtype=BF16, r=16, p=0.1, nested=True).to("cuda")
    want = run(c)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run(c)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
