"""lora_linear on Triton against the float64 reference: in Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own: in an ordinary run
`test_in_the_interpreter` starts it on this same file, and what is below is marked `gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from forms import grid, matrix
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter
from torch import Tensor

import peft_kernels as pk
from peft_kernels import formats, philox, tuning
from peft_kernels.ops import lora_linear as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight
from peft_kernels.triton_lib import host

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

device = pytest.importorskip("peft_kernels.triton_lib.device")
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
# small tiles, so that small shapes have several of everything: rows, columns, steps, ranks, parts of a sum
SMALL: dict[str, dict[str, int]] = {
    "project": {"BM": 16, "BK": 32, "BR": 16, "programs": 6},
    "outer": {"BM": 16, "BN": 32, "BR": 16, "programs": 6},
    "forward": {"BM": 16, "BN": 32, "BK": 32, "BR": 16, "GROUP": 2, "programs": 6},
    "backward": {"BM": 16, "BN": 32, "BK": 32, "BR": 16, "GROUP": 2, "programs": 6},
}


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Every test below, in float32, float16 and bfloat16, on CPU tensors."""
    run_in_the_interpreter(__file__, "not the_interpreter")  # the two tests of the ordinary process


@not_interpreted
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pk.use_backend("triton"), pytest.raises(pk.BackendUnavailable, match="TRITON_INTERPRET=1"):
        pk.lora_linear(torch.zeros(2, 4), torch.zeros(3, 4))


@dataclass(frozen=True)
class Case:
    """One call. w: dense, or bits of (quant_type, blocksize, nested)."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    adapter: torch.dtype = f32
    p: float = 0.0
    w: tuple[str, int, bool] | None = ("nf4", 64, True)
    bias: bool = True
    scaling: float = 2.0


@dataclass
class Inputs:
    x: Tensor
    dy: Tensor
    weight: tuple[Any, ...]
    dense: Tensor  # float64
    a: Tensor | None
    b: Tensor | None
    bias: Tensor | None
    seed: Tensor

    def forward(self, c: Case) -> tuple[Any, ...]:
        return (self.x, *self.weight, c.N, self.a, self.b, c.scaling, self.bias, c.p, self.seed)

    def backward(self, c: Case, s: Tensor | None) -> tuple[Any, ...]:
        return (self.dy, self.x, *self.weight, self.a, self.b, s, c.scaling, c.p, self.seed, True, c.r > 0)

    def exact(self) -> Inputs:
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double()

        weight = (self.dense, None, None, None, None, 0, 64, 256)
        x, dy = self.x.double(), self.dy.double()
        return Inputs(x, dy, weight, self.dense, wide(self.a), wide(self.b), wide(self.bias), self.seed)


def make(c: Case) -> Inputs:
    def rand(*shape: int, dtype: torch.dtype = c.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)

    if c.w is None:
        weight: tuple[Any, ...] = (rand(c.N, c.K, scale=0.1), None, None, None, None, 0, 64, 256)
    else:
        kind, blocksize, nested = c.w
        quant = random_quant_weight(c.N, c.K, quant_type=kind, blocksize=blocksize, nested=nested)
        weight = quant.to(DEVICE).flatten()
    dense = op.dense_weight(*weight, c.N, c.K, torch.float64)
    a = rand(c.r, c.K, dtype=c.adapter, scale=0.2) if c.r else None
    b = rand(c.N, c.r, dtype=c.adapter, scale=0.2) if c.r else None
    bias = rand(c.N) if c.bias else None
    seed = torch.tensor([0x0123456789ABCDEF], device=DEVICE)
    return Inputs(rand(c.M, c.K), rand(c.M, c.N), weight, dense, a, b, bias, seed)


def dropped_magnitude(t: Tensor, c: Case, seed: Tensor) -> Tensor:
    return philox.dropout(t.abs(), c.p, seed) if c.p else t.abs()


def check(c: Case) -> None:
    """y, s, dx, da, db of one case: each no worse than the reference in the same dtypes."""
    i = make(c)
    e = i.exact()
    with pk.use_backend("reference"):
        eager = op.forward_op.op(*i.forward(c))
        exact = op.forward_op.op(*e.forward(c))
        eager_grads = op.backward_op.op(*i.backward(c, eager[1] if c.r else None))
        exact_grads = op.backward_op.op(*e.backward(c, exact[1] if c.r else None))
    with pk.use_backend("triton"):
        y, s = op.forward_op.op(*i.forward(c))
        dx, da, db = op.backward_op.op(*i.backward(c, s if c.r else None))
    size_y = e.x.abs() @ e.dense.abs().t()
    size_dx = e.dy.abs() @ e.dense.abs()
    if c.r:
        assert e.a is not None
        assert e.b is not None
        size_x = dropped_magnitude(e.x, c, i.seed)
        size_s = size_x @ e.a.abs().t()
        size_ds = c.scaling * (e.dy.abs() @ e.b.abs())
        size_y = size_y + c.scaling * (size_s @ e.b.abs().t())
        size_dx = size_dx + dropped_magnitude(size_ds @ e.a.abs(), c, i.seed)
        assert_no_worse(s, eager[1], exact[1], size_s)
        assert_no_worse(da, eager_grads[1], exact_grads[1], size_ds.t() @ size_x)
        assert_no_worse(db, eager_grads[2], exact_grads[2], c.scaling * (e.dy.abs().t() @ size_s))
    assert_no_worse(y, eager[0], exact[0], size_y)
    assert_no_worse(dx, eager_grads[0], exact_grads[0], size_dx)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with ExitStack() as stack:
        for kernel, values in SMALL.items():
            stack.enter_context(tuning.override(kernel, **values))
        yield


SHAPES = {
    "one": Case(1, 1, 1, 1, bf16),
    "no rows": Case(0, 20, 64, 4, bf16),
    "one row": Case(1, 70, 256, 8, bf16, p=0.2),
    "aligned": Case(32, 64, 128, 16, f16),
    "nothing aligned": Case(19, 37, 101, 5, bf16, p=0.3),
    "blocks straddle rows": Case(19, 50, 98, 20, f16, p=0.3),
    "rows straddle bytes": Case(7, 33, 35, 3, f16),
    "large block": Case(9, 40, 96, 4, bf16, w=("nf4", 4096, False)),
    "small block": Case(9, 40, 96, 4, bf16, w=("fp4", 32, True), p=0.1),
    "fp4": Case(9, 40, 128, 4, f16, f16, w=("fp4", 128, False)),
    "many ranks": Case(5, 48, 64, 70, bf16, p=0.1),
    "half adapter": Case(20, 48, 64, 16, bf16, bf16, p=0.1),
    "no adapter": Case(20, 48, 192, 0, f16),
    "no adapter, no bias": Case(3, 48, 192, 0, bf16, bias=False),
    "dense": Case(20, 37, 101, 9, bf16, w=None, p=0.1),
    "dense float16": Case(20, 48, 64, 16, f16, f16, w=None),
    "float32": Case(19, 37, 101, 5, f32, p=0.3),
    "float32 dense": Case(20, 48, 72, 17, f32, w=None, p=0.1),
    "float32, no adapter": Case(2, 48, 192, 0, f32, w=("fp4", 64, False)),
}


@on_device
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_no_worse_than_eager(name: str) -> None:
    check(SHAPES[name])


@on_device
@pytest.mark.parametrize(("name", "left"), grid(
    ["aligned", "nothing aligned", "blocks straddle rows", "no adapter", "float32"], [True, False]))  # fmt: skip
@pytest.mark.usefixtures("small_tiles")
def test_no_worse_with_the_weight_on_either_side(name: str, left: bool) -> None:
    with tuning.override("forward", LEFT=left), tuning.override("backward", LEFT=left):
        check(SHAPES[name])


@on_device
@pytest.mark.parametrize("c", matrix(
    [
        Case(40, 150, 192, 16, bf16, p=0.05),
        Case(130, 140, 128, 16, f16),
        Case(1, 130, 576, 16, bf16),
        Case(20, 130, 128, 64, bf16, p=0.05),
        Case(40, 130, 192, 16, f32, p=0.05),
        Case(3, 40, 192, 512, bf16),
    ],
    short=lambda c: (c.M, c.r) in ((20, 64), (40, 16)) and c.N != 150,
), ids=str)  # fmt: skip
def test_no_worse_with_the_tables_tiles(c: Case) -> None:
    check(c)


@on_device
@pytest.mark.parametrize("name", matrix(
    ["nothing aligned", "blocks straddle rows", "rows straddle bytes", "small block", "half adapter", "dense",
     "no adapter", "no adapter, no bias", "one"],
    short=["blocks straddle rows", "small block", "half adapter", "dense", "no adapter", "one"]))  # fmt: skip
@pytest.mark.usefixtures("small_tiles")
def test_no_worse_by_panels(name: str) -> None:
    """The way of many rows: W decoded in panels of 64 rows or columns, multiplied by the vendor's matmul."""
    c = SHAPES[name]
    with tuning.override("panels", from_M=1, from_M_dense=1, elements=64 * max(c.N, c.K)):
        check(replace(c, M=c.M + 1, N=c.N + 40, K=c.K + 40))


@on_device
@pytest.mark.parametrize("dtype", matrix([f32, bf16], short=[bf16]))
@pytest.mark.usefixtures("small_tiles")
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    c = Case(17, 33, 72, 20, dtype, p=0.1)
    i = make(c)
    with pk.use_backend("triton"):
        runs = []
        for _ in range(2):
            y, s = op.forward_op.op(*i.forward(c))
            runs.append((y, s, *op.backward_op.op(*i.backward(c, s))))
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)


@on_device
@pytest.mark.parametrize(("k", "p"), [(64, 0.5), (99, 0.05), (62, 0.999)])
@pytest.mark.usefixtures("small_tiles")
def test_the_same_elements_are_dropped(k: int, p: float) -> None:
    """The masks inside s, dA and dx, made visible one by one, are those of philox.py, bit for bit."""
    m, scale = 21, torch.tensor(1.0 / (1.0 - p), dtype=f32, device=DEVICE)
    eye, ones = torch.eye(k, device=DEVICE), torch.ones(m, k, device=DEVICE)
    zero = torch.zeros(k, k, device=DEVICE)
    seed = torch.tensor([-0x123456789ABCDEF], device=DEVICE)
    expected = philox.keep_mask(m, k, p, seed, DEVICE) * scale
    with pk.use_backend("triton"):
        dense = (zero, None, None, None, None, 0, 64, 256)
        _, s = op.forward_op.op(ones, *dense, k, eye, eye, 1.0, None, p, seed)
        dx, _, _ = op.backward_op.op(ones, ones, *dense, eye, eye, s, 1.0, p, seed, True, False)
        # row m of dy selects row m of x: dA[r, :] = drop(x)[r, :]
        rows = torch.eye(m, k, device=DEVICE)
        _, da, _ = op.backward_op.op(rows, ones, *dense, eye, eye, s, 1.0, p, seed, False, True)
    assert_same_bits(s, expected)
    assert_same_bits(dx, expected)
    assert_same_bits(da[:m], expected)


@on_device
@pytest.mark.parametrize(("kind", "shape", "blocksize", "nested"), grid(
    ["nf4", "fp4"], [(40, 128), (33, 70), (21, 45)], [32, 64, 1024], [False, True], strength=2))  # fmt: skip
@pytest.mark.usefixtures("small_tiles")
def test_float32_decodes_exactly(kind: str, shape: tuple[int, int], blocksize: int, nested: bool) -> None:
    """Unit rows pick single weights, so y and dx hold the decoded values: equal to formats.decode_4bit, bit for bit."""
    n, k = shape
    quant = random_quant_weight(n, k, quant_type=kind, blocksize=blocksize, nested=nested).to(DEVICE)
    flat = quant.flatten()
    w = formats.decode_4bit(*flat, quant.shape) + 0.0  # a product with zeros has no negative zero
    with pk.use_backend("triton"):
        y, _ = op.forward_op.op(torch.eye(k, device=DEVICE), *flat, n, None, None, 1.0, None, 0.0, None)
        one = torch.eye(n, device=DEVICE)
        dx, _, _ = op.backward_op.op(one, one.new_zeros(n, k), *flat, None, None, None, 1.0, 0.0, None, True, False)
    assert_same_bits(y, w.t().contiguous())
    assert_same_bits(dx, w)


@on_device
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [bf16, f16])
def test_the_pair_table_rounds_hardly_worse_than_eager(kind: str, dtype: torch.dtype) -> None:
    """Every code at 64 scales that float16 holds without underflow. Eager rounds table * absmax once; here the table
    is in float16 and the product is rounded again: the worst relative error may grow by half an ulp of float16 only."""
    scales = torch.logspace(-1.5, 0.5, 64)
    packed = torch.arange(256, dtype=torch.int64).to(torch.uint8).repeat(16)
    quant = pk.QuantWeight(packed, scales.repeat(2), (64, 128), quant_type=kind).to(DEVICE)
    w = formats.decode_4bit(*quant.flatten(), quant.shape).double()
    with pk.use_backend("triton"):
        one_hot = torch.eye(128, dtype=dtype, device=DEVICE)
        y = pk.lora_linear(one_hot, quant).t().double()
    assert ((y == 0) == (w == 0)).all()
    relative = ((y - w).abs() / w.abs()).nan_to_num(0.0)
    assert relative.max() <= torch.finfo(dtype).eps / 2 + torch.finfo(f16).eps / 2


@on_device
@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_the_public_function() -> None:
    """Through autograd, from a non-contiguous 3-D x, against the reference in float64."""
    c = Case(24, 50, 96, 8, bf16, p=0.1)
    i = make(c)
    quant = random_quant_weight(c.N, c.K, nested=True).to(DEVICE)
    results = {}
    for backend, wide in (("reference", False), ("exact", True), ("triton", False)):

        def leaf(t: Tensor | None, wide: bool = wide) -> Tensor:
            assert t is not None
            return (t.double() if wide else t.clone()).requires_grad_()

        x, a, b, bias = leaf(i.x.reshape(4, 6, c.K)), leaf(i.a), leaf(i.b), leaf(i.bias)
        with pk.use_backend("triton" if backend == "triton" else "reference"):
            weight = i.dense if wide else quant
            y = pk.lora_linear(x.transpose(0, 1), weight, a, b, c.scaling, bias, c.p, i.seed)
            dy = i.dy.reshape(6, 4, c.N).to(y.dtype)
            results[backend] = (y, *torch.autograd.grad(y, (x, a, b, bias), dy))
    for k, exact in enumerate(results["exact"]):
        magnitude = torch.full_like(exact, float(exact.detach().abs().max())).detach()
        assert_no_worse(results["triton"][k].detach(), results["reference"][k].detach(), exact.detach(), magnitude)


@on_device
@pytest.mark.usefixtures("small_tiles")
def test_a_transposed_dense_weight() -> None:
    """Conv1D keeps W as [K, N]: its transpose is read in place, by strides."""
    x = torch.randn(9, 45, device=DEVICE)
    stored = torch.randn(45, 23, device=DEVICE)
    with pk.use_backend("triton"):
        assert_same_bits(pk.lora_linear(x, stored.t()), pk.lora_linear(x, stored.t().contiguous()))


@on_device
@pytest.mark.usefixtures("small_tiles")
def test_only_the_gradients_that_are_asked_for() -> None:
    c = Case(9, 40, 64, 4, f32)
    i = make(c)
    with pk.use_backend("triton"):
        _, s = op.forward_op.op(*i.forward(c))
        args = i.backward(c, s)[:-2]
        both = op.backward_op.op(*args, True, True)
        only_dx, no_da, no_db = op.backward_op.op(*args, True, False)
        no_dx, only_da, only_db = op.backward_op.op(*args, False, True)
    assert no_dx.numel() == no_da.numel() == no_db.numel() == 0
    # without dA and dB, ds is summed in another order
    exact = op.backward_op.reference(*i.exact().backward(c, s.double()))[0]
    size = i.dy.double().abs() @ (i.dense.abs() + c.scaling * i.exact().b.abs() @ i.exact().a.abs())
    assert_no_worse(only_dx, both[0], exact, size)
    assert_same_bits(only_da, both[1])
    assert_same_bits(only_db, both[2])


@on_device
def test_what_is_not_served_says_why() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    with pk.use_backend("triton"), pytest.raises(pk.BackendUnavailable, match="float64"):
        pk.lora_linear(x, torch.zeros(3, 4, dtype=torch.float64, device=DEVICE))


@triton.jit(do_not_specialize=["threshold"])
def mask_kernel(p_seed, p_out, first_row, K, threshold, BY_FOUR: tl.constexpr):
    b_keep = device.keep_mask(p_seed, first_row + tl.arange(0, 16), 64, K, threshold, 16, 32, BY_FOUR)
    i = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(p_out + i, b_keep.to(tl.int8))


@on_device
def test_the_mask_of_far_rows() -> None:
    """Counters beyond 32 bits: rows near 2**31 of a wide input, by Triton's Philox and by ours."""
    seed = torch.tensor([0x7EDCBA9876543210], device=DEVICE)
    for width, first in ((57344, 2_000_000_000), (57345, 2_147_000_003)):
        rows = torch.arange(first, first + 16, dtype=torch.int64, device=DEVICE)[:, None]
        element = rows * width + torch.arange(64, 96, device=DEVICE)[None, :]
        assert int(element.max()) >> 2 > 2**32
        words = torch.stack(philox.words((element >> 2).reshape(-1), seed), dim=1)
        word = words.gather(1, (element & 3).reshape(-1, 1)).reshape(16, 32)
        for bound in (philox.threshold(0.05), int(word[7, 9]), int(word.max())):  # at the bound itself it is kept
            out = torch.empty((16, 32), dtype=torch.int8, device=DEVICE)
            host.launch(mask_kernel, (1,), seed, out, first, width, bound, BY_FOUR=width % 4 == 0, num_warps=4,
                        num_stages=1)  # fmt: skip
            assert_same_bits(out.bool(), word >= bound)
