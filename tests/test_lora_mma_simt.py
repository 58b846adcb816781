"""lora_linear on the GPU for 9 to 512 rows of x (csrc/cuda/lora_mma.cu), run on the host (csrc/simt).

Every tile of every architecture runs: pk_simt_set_device says which GPU the host is taken for. What nvcc makes of the
sources is not seen here; the tests marked `gpu` run the same cases on a GPU.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.static import splits
from peft_kernels import formats, philox, quantize_4bit, use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.ops import lora_linear as op
from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed, under_asan = tools["simt"], tools["races"], tools["seed"], tools["under_asan"]
lora = runpy.run_path(str(Path(__file__).with_name("tools") / "lora_tools.py"))
make = lora["make"]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# M, N, K and what else: each tile (16, 32, 64, 128 rows; several of them), sums in parts, odd sizes, every blocksize
CASES = [
    (9, 130, 256, {"dtype": BF16, "r": 8, "bias": True}),
    (16, 128, 1024, {"dtype": F16, "r": 16, "nested": True, "quant": "fp4"}),
    (12, 200, 2112, {"dtype": BF16, "r": 1, "nested": True, "ab": BF16}),
    (17, 70, 320, {"dtype": BF16, "r": 33, "ab": F16, "blocksize": 128, "bias": True}),
    (40, 136, 160, {"dtype": F16, "r": 4, "blocksize": 32}),
    (64, 264, 192, {"dtype": BF16, "r": 64, "nested": True, "p": 0.3}),
    (70, 257, 96, {"dtype": BF16, "r": 2, "bias": True, "blocksize": 256}),
    (130, 96, 576, {"dtype": F16, "r": 7, "nested": True}),
    (30, 8, 4096, {"dtype": BF16, "blocksize": 4096, "nested": True}),
    (10, 1, 32, {"dtype": BF16, "r": 256}),
    # sums in parts that a kernel of its own adds, the last of them of half a step
    (100, 132, 1600, {"dtype": BF16, "r": 8, "bias": True, "nested": True}),
    (66, 41, 1536, {"dtype": F16, "r": 20, "ab": BF16, "quant": "fp4"}),
    (66, 40, 2500, {"dtype": BF16, "r": 3, "blocksize": 128}),
    # rows that cp.async cannot take: a number of columns that 32 does not divide, rows that start within a byte
    (21, 37, 77, {"dtype": BF16, "r": 3, "nested": True, "bias": True}),
    (33, 20, 1001, {"dtype": F16, "r": 9, "blocksize": 32}),
    (11, 130, 40, {"dtype": BF16}),
]
SHAPE = ("m", "n", "k", "kwargs")
# by what tables are multiplied before they are rounded: pk_table_factor
SOURCE = (Path(__file__).parents[1] / "csrc" / "cuda" / "values.cuh").read_text()
FP4_FACTOR, BF16_FACTOR, F16_FACTOR = (float.fromhex(v) for v in re.findall(r"(0x1\.\w+p\+0)f", SOURCE))
FACTORS = {(1, BF16): BF16_FACTOR, (1, F16): F16_FACTOR, (2, BF16): FP4_FACTOR, (2, F16): FP4_FACTOR}
DEVICES = (80, 89)  # what a block can have in shared memory: 163 KB, 99 KB


def identity(t: Tensor) -> Tensor:
    return t


def call(case, move: Callable[[Tensor], Tensor] = identity) -> tuple[Tensor, Tensor]:
    """y and s of the CUDA backend, on the CPU again."""
    moved = [move(t) if isinstance(t, Tensor) else t for t in (
        case.x, *case.weight, case.n, case.a, case.b, case.scaling, case.bias, case.p, case.seed)]  # fmt: skip
    with use_backend("cuda"):
        y, s = op.forward_op.op(*moved)
    return y.cpu(), s.cpu()


def check(m: int, n: int, k: int, kwargs: dict, move: Callable[[Tensor], Tensor] = identity) -> None:
    no_worse(make(m, n, k, **kwargs), move)


def no_worse(case, move: Callable[[Tensor], Tensor] = identity) -> None:
    n, k = case.n, case.x.shape[1]
    wide = case.double()
    with use_backend("reference"):
        eager, _ = case.forward(op.forward_op.op)
        exact, _ = wide.forward(op.forward_op.op)
    size = wide.x.abs() @ op.dense_weight(*case.weight, n, k, torch.float64).abs().t()
    if case.a is not None:
        x = philox.dropout(wide.x.abs(), case.p, case.seed) if case.p else wide.x.abs()
        size += case.scaling * (x @ wide.a.abs().t() @ wide.b.abs().t())
    y, _ = call(case, move)
    assert_no_worse(y, eager, exact, size)


def weights(case, n: int, k: int, sums: bool) -> Tensor:
    """W as the kernels have it: the 16-bit value of each code, by a factor, times the scale of its block, over that
    factor, in float32 where sums are scaled, else in 16 bits, and rounded."""
    packed, absmax, nested_absmax, code, offset, quant, blocksize, nested_blocksize = case.weight
    factor = torch.tensor(FACTORS[quant, case.x.dtype])
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: n * k].long()
    value = (formats.table(quant) * factor).to(case.x.dtype).float()[codes].view(n, k)
    if nested_absmax is None:
        scale = absmax * (1 / factor)
    else:
        scale = formats.decode_absmax(absmax, nested_absmax, code * (1 / factor), offset * (1 / factor),
                                       nested_blocksize)  # fmt: skip
    scale = scale.repeat_interleave(blocksize)[: n * k].view(n, k)
    return (value * (scale if sums else scale.to(case.x.dtype).float())).to(case.x.dtype)


def has_the_weights_that_it_says(
    m: int, n: int, k: int, move: Callable[[Tensor], Tensor] = identity, *, sums: bool, **kwargs
) -> None:
    """With rows of x that have a single 1, y is W^T, to the bit."""
    case = make(m, n, k, **kwargs)
    w = weights(case, n, k, sums)
    for first in range(0, k, m):
        case.x = torch.zeros(m, k, dtype=case.x.dtype)
        count = min(m, k - first)
        case.x[torch.arange(count), first + torch.arange(count)] = 1
        y, _ = call(case, move)
        assert_same_bits(y[:count], w[:, first : first + count].t().contiguous() + 0)  # + 0: sums of zeros are +0


@pytest.mark.parametrize(SHAPE, CASES)
def test_no_worse_than_eager(simt, m, n, k, kwargs):
    for device in DEVICES:
        simt.pk_simt_set_device(device, 108)
        check(m, n, k, kwargs)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("nested", [False, True])
def test_has_the_weights_that_it_says(simt, nested, dtype):
    """Tiles of 16, 32, 64 and 128 rows of x, two scales in 64 elements, any element."""
    for m, k, blocksize, sums in ((16, 128, 64, True), (32, 192, 64, True), (64, 256, 128, True), (128, 128, 64, None),
                                  (32, 96, 32, False), (128, 96, 64, False), (32, 75, 64, False)):  # fmt: skip
        for device in DEVICES:
            simt.pk_simt_set_device(device, 108)
            has_the_weights_that_it_says(m, 40, k, sums=device == 89 if sums is None else sums, dtype=dtype,
                                         nested=nested, blocksize=blocksize)  # fmt: skip


@pytest.mark.parametrize("m", [1, 16, 128])
def test_x_with_a_mean(simt, m):
    """Where all of x is positive, errors of weights that depend on the code add up; eager's do not."""
    n, k = 32, 2048
    case = make(m, n, k, dtype=BF16)
    case.x = case.x.abs()
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    case.weight = quantize_4bit(w, "nf4", blocksize=64).flatten()
    with use_backend("reference"):
        eager, _ = case.forward(op.forward_op.op)
        exact, _ = case.double().forward(op.forward_op.op)
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (call(case)[0], eager))
    assert ours < 2 * theirs


def test_scales_of_any_size(simt):
    """Next to one another, from the smallest that bfloat16 has to the largest that W allows."""
    for m, k, blocksize in ((16, 512, 64), (128, 512, 64), (20, 480, 32)):
        case = make(m, 24, k, dtype=BF16, blocksize=blocksize)
        absmax = 10.0 ** (torch.arange(case.weight[1].numel()) * 7 % 61 - 35.0)
        case.weight = (case.weight[0], absmax, *case.weight[2:])
        no_worse(case)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("quant", [1, 2])
def test_errors_of_the_table_have_no_mean(quant, dtype):
    """The mean error of a weight, where its scale is 1, is an eighth of what it is without a factor, or nothing, for
    normal weights at any block size and for codes that are equally frequent."""
    table = formats.table(quant).double()
    ascending = table.sort()

    def frequencies(blocksize: int) -> Tensor:
        w = torch.randn(2**18 // blocksize, blocksize, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        places = torch.bucketize(w / w.abs().amax(1, keepdim=True), (ascending[0][1:] + ascending[0][:-1]) / 2)
        return torch.bincount(ascending[1][places.flatten()], minlength=16) / w.numel()

    def mean_error(factor: float) -> float:
        error = (formats.table(quant) * factor).to(dtype).double() / factor - table
        usual = [*map(frequencies, (32, 64, 256, 1024)), torch.ones(16) / 16]
        return max(float((error * p).sum().abs()) for p in usual)

    assert mean_error(FACTORS[quant, dtype]) <= max(mean_error(1.0) / 8, 2.0**-20)


@pytest.mark.parametrize("nested_blocksize", [32, 256, 1024])
def test_nested_blocks(simt, nested_blocksize):
    """Of more than one inner block a row, and fewer."""
    case = make(16, 64, 2048, dtype=BF16, nested=True)
    blocks = case.weight[1].numel()
    scales = torch.rand(-(-blocks // nested_blocksize)) * 0.02 + 0.01
    case.weight = (*case.weight[:2], scales, *case.weight[3:7], nested_blocksize)
    case.x = torch.eye(16, 2048, dtype=BF16)
    assert_same_bits(call(case)[0], weights(case, 64, 2048, sums=True)[:, :16].t().contiguous() + 0)


def test_every_order_of_threads_gives_the_same_bits(simt, seed):
    # parts that arrive in another order, too
    simt.pk_simt_set_device(80, 108)
    for m, n, k in ((16, 128, 1088), (40, 100, 512), (12, 96, 288), (12, 33, 77), (66, 40, 1088)):
        case = make(m, n, k, dtype=BF16, r=8, nested=True, bias=True)
        simt.pk_simt_set_seed(0)
        expected, _ = call(case)
        simt.pk_simt_set_seed(seed + 1)
        assert_same_bits(call(case)[0], expected)


@pytest.mark.parametrize(("m", "bm", "k", "parts"), [(16, 16, 4096, 8), (24, 32, 2112, 4), (60, 64, 1088, 2)])
def test_who_adds_the_parts_changes_no_bit(simt, m, bm, k, parts):
    """The last block of a tile, or a kernel of its own: the same parts in the same order. By the cost model a GPU of 60
    SMs has one, of 132 the other."""
    case = make(m, 132, k, dtype=BF16, r=8, nested=True, bias=True)
    sums = splits.Sums(2, -(-k // 128), splits.step_clocks(bm, 128, 128, True), bm * 128 * 4)
    found = []
    for sms, apart in ((60, False), (132, True)):
        assert sums.split(sms) == (parts, apart)
        simt.pk_simt_set_device(89, sms)
        found.append(call(case)[0])
    assert_same_bits(*found)


def test_no_races(races):
    for device in DEVICES:
        races.pk_simt_set_device(device, 108)
        for i, (m, n, k) in enumerate(((12, 130, 1024), (30, 40, 192), (50, 40, 192), (100, 40, 1088), (20, 20, 77))):
            races.pk_simt_set_seed(i)
            check(m, n, k, {"dtype": BF16, "r": 20, "nested": True, "bias": True})


@pytest.mark.slow
def test_nothing_out_of_bounds():
    under_asan(__file__, "-k", "no_worse or any_storage")


@pytest.mark.parametrize("offset", [1, 8])
def test_any_storage(simt, offset):
    """x and the codes may start anywhere, y's rows end anywhere."""
    m, n, k = 20, 41, 128
    case = make(m, n, k, dtype=BF16, r=4)
    aligned, _ = call(case)
    case.x = torch.empty(m * k + offset, dtype=BF16)[offset:].view(m, k).copy_(case.x)
    packed = torch.empty(n * k // 2 + offset, dtype=torch.uint8)[offset:].copy_(case.weight[0])
    case.weight = (packed, *case.weight[1:])
    size = case.x.double().abs() @ op.dense_weight(*case.weight, n, k, torch.float64).abs().t()
    with use_backend("reference"):
        eager, _ = case.forward(op.forward_op.op)
        exact, _ = case.double().forward(op.forward_op.op)
    for y in (call(case)[0], aligned):
        assert_no_worse(y, eager, exact, size)


def test_infinite_scales_stay_in_their_rows(simt):
    """Past the end of K the scales are zero, not what comes next in memory."""
    case = make(10, 3, 160, dtype=BF16, blocksize=32)
    absmax = case.weight[1].clone()
    absmax[5:10] = float("inf")  # all of row 1
    case.weight = (case.weight[0], absmax, *case.weight[2:])
    y, _ = call(case)
    assert y[:, [0, 2]].isfinite().all()
    assert not y[:, 1].isfinite().any()


def test_the_limit_of_rows_is_said(simt):
    case = make(513, 4, 32, dtype=BF16)
    with pytest.raises(BackendUnavailable, match="serves up to 512 rows of x, these are 513"):
        call(case)
    check(512, 8, 32, {"dtype": BF16})


@pytest.mark.gpu
@pytest.mark.parametrize(SHAPE, [*CASES, (100, 4096, 4096, {"dtype": BF16, "r": 16, "nested": True})])
def test_on_a_gpu_no_worse_than_eager(m, n, k, kwargs):
    check(m, n, k, kwargs, Tensor.cuda)


@pytest.mark.gpu
def test_on_a_gpu_has_the_weights_that_it_says():
    for k, blocksize in ((96, 32), (128, 64), (75, 64)):
        has_the_weights_that_it_says(32, 40, k, Tensor.cuda, sums=k == 128, dtype=BF16, nested=True,
                                     blocksize=blocksize)  # fmt: skip


@pytest.mark.gpu
def test_on_a_gpu_bits_stay_the_same_also_in_a_graph():
    case = make(16, 512, 4096, dtype=BF16, r=8, nested=True, bias=True)
    expected, _ = call(case, Tensor.cuda)
    for _ in range(20):
        assert_same_bits(call(case, Tensor.cuda)[0], expected)
    arguments = [t.cuda() if isinstance(t, Tensor) else t for t in (
        case.x, *case.weight, case.n, case.a, case.b, case.scaling, case.bias, case.p, case.seed)]  # fmt: skip
    graph = torch.cuda.CUDAGraph()
    with use_backend("cuda"):
        with torch.cuda.graph(graph):
            y, _ = op.forward_op.op(*arguments)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert_same_bits(y.cpu(), expected)
