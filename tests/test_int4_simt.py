"""CUDA backends over integers of 4 bits by group: the host build of their sources (csrc/simt); on a GPU where there is
one. Which kernels there are test_lora_simt.py and test_lora_mma_simt.py say; here are the ends that groups have."""

from __future__ import annotations

import runpy
from pathlib import Path

import dora_tools
import multi_tools
import pytest
import torch
from forms import by_form, grid, matrix, share
from lora_tools import BF16, F16, FLOATS, Case, Stack, check, make
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, explain, native, use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.ops import lora_linear as op
from peft_kernels.ops import lora_linear_stacked as stacked
from peft_kernels.ops.dequantize_4bit import cuda as decoding
from peft_kernels.ops.lora_linear import cuda
from peft_kernels.testing import assert_same_bits, random_affine_weight

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed, device = (tools[name] for name in ("simt", "races", "seed", "device"))
HALVES = (BF16, F16)
PARTS = [("codes", False), ("values", False), (None, False), (None, True), ("codes", True)]  # zeros and shifts


def groups(m: int, n: int, k: int, blocksize: int, i: int = 0, *, dtype: torch.dtype = BF16, **more) -> Case:
    """A call with the zeros and shifts of PARTS[i], and scales of a dtype that goes with i."""
    c = make(m, n, k, dtype=dtype, **more)
    zeros, shifts = PARTS[i % len(PARTS)]
    weight = random_affine_weight(n, k, "int4", blocksize, zeros=zeros, shifts=shifts, scales=FLOATS[i % 3], seed=i)
    c.weight = weight.flatten()
    return c


def run(c: Case) -> tuple[Tensor, ...]:
    y, s = c.forward(op.forward_op.op)
    return y, s, *c.backward(op.backward_op.op, s if c.a is not None else None)


# ---- dequantize_4bit, norms ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decode_gives_the_bits_of_the_reference(device: str, dtype: torch.dtype) -> None:
    shapes = [(33, 256, 64), (7, 128, 16), (5, 100, 48), (33, 99, 33), (3, 130, 128), (2, 2056, 8), (1, 1, 1)]
    for i, (n, k, group) in enumerate(shapes):
        for j, (zeros, shifts) in enumerate(PARTS):
            w = random_affine_weight(n, k, "int4", group, zeros=zeros, shifts=shifts, act_order=(i + j) % 3 == 0,
                                     scales=FLOATS[(i + j) % 3], seed=i)  # fmt: skip
            with use_backend("reference"):
                want = dequantize_4bit(w, dtype)
            assert_same_bits(dequantize_4bit(w.to(device), dtype).cpu(), want)


def test_rows_are_decoded_by_themselves(device: str) -> None:
    for n, k, apart in ((7, 96, 1), (6, 33, 2)):
        w = random_affine_weight(n, k, "int4", 32, shifts=True).to(device)
        want, flat = dequantize_4bit(w), w.flatten()
        assert decoding.rows_apart(k, flat) == apart
        for first in range(0, n, 2):
            got = decoding.decode_rows(range(first, n), k, torch.empty(n * k, device=device), flat)
            assert_same_bits(got, want[first:])


def test_an_index_that_was_overwritten_gives_nan(device: str) -> None:
    w = random_affine_weight(3, 96, "int4", 32, act_order=True).to(device)
    w.nested_code[5], w.nested_code[7] = 3, -1
    got = dequantize_4bit(w)
    assert got.isnan().sum(0).nonzero().flatten().tolist() == [5, 7]


def test_norms(device: str) -> None:
    shapes = [(64, 128, 16, 64), (37, 768, 5, 32), (1, 32, 1, 32), (7, 512, 33, 256)]
    for i, (n, k, r, blocksize) in enumerate([*shapes, *shapes[:1]]):
        c = groups(1, n, k, blocksize, i, r=r, ab=FLOATS[i % 3]).to(device)
        assert_same_bits(dora_tools.check_norm(c, base_sq=True), first := dora_tools.check_norm(c))
        w = c.weight[0]
        c.weight = (torch.empty(w.numel() + 1, dtype=w.dtype, device=device)[1:].copy_(w), *c.weight[1:])
        assert_same_bits(dora_tools.check_norm(c), first)


# ---- lora_linear against float64 -------------------------------------------------------------------------------------
FEW = [(64, 128, 32), (52, 192, 64), (7, 1152, 128), (1, 96, 32), (33, 64, 64)]


@pytest.mark.parametrize(("m", "dtype"), grid([1, 2, 5, 8], HALVES))
def test_few_rows(device: str, m: int, dtype: torch.dtype) -> None:
    for i, (n, k, blocksize) in enumerate(FEW):
        check(groups(m, n, k, blocksize, i, dtype=dtype).to(device))
        c = groups(m, n, k, blocksize, i + 1, dtype=dtype, r=16, ab=FLOATS[i % 3], p=0.25, bias=True)
        check(c.to(device))


@pytest.mark.parametrize("m", [1, 8])
def test_rows_of_w_are_split(device: str, m: int) -> None:
    for i, k in enumerate((2176, 4096)):
        check(groups(m, 40, k, 128, i, r=8, bias=True).to(device))


MORE = [(0, 64, 320, 64), (1, 20, 96, 32), (2, 9, 32, 32), (3, 328, 128, 128), (4, 39, 1600, 64)]


@pytest.mark.parametrize(("m", "dtype"), grid([9, 16, 40, 64], HALVES))
def test_more_rows(device: str, m: int, dtype: torch.dtype) -> None:
    for i, n, k, blocksize in share(m, (9, 16, 40, 64), MORE):
        check(groups(m, n, k, blocksize, i + m, dtype=dtype, r=6 * (i % 2), p=0.25, bias=i == 2).to(device))


@pytest.mark.parametrize("m", matrix([70, 130], short=[130]))
def test_more_rows_than_the_backward_takes(device: str, m: int) -> None:
    with use_backend(lora_linear="cuda", lora_linear_backward="reference"):
        for i, (n, k, blocksize) in enumerate([(72, 128, 64), (39, 1600, 32), (40, 2048, 128)]):
            check(groups(m, n, k, blocksize, i, r=8, bias=True).to(device))


def test_groups_as_long_as_a_row(device: str) -> None:
    for m in (3, 20):
        check(groups(m, 12, 1024, 1024, m, r=2).to(device))


@pytest.mark.parametrize("m", [2, 20])
def test_storage_that_starts_anywhere(device: str, m: int) -> None:
    def shifted(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)

    c = groups(m, 36, 128, 32, 4, r=4, p=0.2, bias=True).to(device)
    c.x, c.dy = shifted(c.x), shifted(c.dy)
    check(c)
    c.weight = (shifted(c.weight[0]), *c.weight[1:])
    check(c)


def no_worse_by_far(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    ours, theirs = ((t.double() - exact).square().mean().sqrt() for t in (got, eager))
    assert ours < 2 * theirs


@pytest.mark.parametrize(("m", "dtype"), matrix([(2, BF16), (16, BF16), (64, BF16), (64, F16)], short=[(64, BF16)]))
def test_x_and_dy_with_a_mean(device: str, m: int, dtype: torch.dtype) -> None:
    """Weights of a quantiser, zeros beside the middle: what the two terms of W have in common goes away again."""
    c = groups(m, 1024, 1024, 64, dtype=dtype).to(device)
    c.x, c.dy = c.x.abs(), c.dy.abs()
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1)).to(device)
    c.weight = QuantWeight.quantize((w + w.square() / 8) * 0.02, "int4", blocksize=64).flatten()
    got = run(c)
    with use_backend("reference"):
        eager, exact = run(c), run(c.double())
    for i in (0, 2):
        no_worse_by_far(got[i], eager[i], exact[i])


@pytest.mark.parametrize("m", matrix([2, 16, 64], short=[2, 16]))
def test_codes_far_from_the_middle(device: str, m: int) -> None:
    """Of sums that are scaled in float32 nothing is lost: codes 0 to 4 around zeros of 2."""
    c = groups(m, 256, 1024, 64).to(device)
    c.x = c.x.abs()
    codes = torch.randint(0, 5, (256 * 1024,), generator=torch.Generator().manual_seed(2), dtype=torch.int64)
    codes = codes.to(torch.uint8).to(device)
    c.weight[0].view(-1).copy_(codes[::2] << 4 | codes[1::2])
    c.weight[2].fill_(2)
    got = c.forward(op.forward_op.op)[0]
    with use_backend("reference"):
        eager, exact = c.forward(op.forward_op.op)[0], c.double().forward(op.forward_op.op)[0]
    no_worse_by_far(got, eager, exact)


def test_a_broken_scale_stays_in_its_row_and_columns(device: str) -> None:
    for value, m, blocksize in ((float("nan"), 5, 32), (float("inf"), 5, 64), (float("inf"), 20, 64)):
        c = groups(m, 40, 192, blocksize, 1).to(device)
        want, last = run(c), 192 // blocksize - 1
        c.weight[1][17, last] = value
        got = run(c)
        assert not got[0][:, 17].isfinite().any()
        others = [n for n in range(40) if n != 17]
        assert_same_bits(got[0][:, others], want[0][:, others])
        assert not got[2][:, last * blocksize :].isfinite().any()
        assert_same_bits(got[2][:, : last * blocksize], want[2][:, : last * blocksize])


# ---- stacks, many adapters, DoRA -------------------------------------------------------------------------------------
@pytest.mark.parametrize("m", matrix([1, 8, 40], short=[8, 40]))
def test_stacked(device: str, m: int) -> None:
    """Groups of two sizes, some without zeros, beside NF4."""
    sizes = [(40, 64, 0), (24, 64, 3), (33, 32, 2)]
    cases = [groups(m, n, 192, blocksize, i, r=4 + i, ab=FLOATS[i % 3]) for n, blocksize, i in sizes]
    stack = Stack([*cases, make(m, 20, 192, dtype=BF16, nested=True, r=3)])
    stack = Stack([c.to(device) for c in stack.cases])
    together = stack.forward(stacked.forward_op.op)
    for i, c in enumerate(stack.cases):
        for got, want in zip((together[i], together[4 + i]), c.forward(op.forward_op.op), strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize(("m", "dtype"), grid([3, 8, 20], HALVES))
def test_many_adapters(device: str, m: int, dtype: torch.dtype) -> None:
    for i, n, k, blocksize in share(m, (3, 8, 20), [(0, 64, 128, 64), (1, 7, 192, 32), (2, 40, 2176, 128)]):
        c = multi_tools.make_multi(m, n, k, [4, 9, 1], dtype=dtype, p=0.2 * (i == 1), ab=FLOATS[i], bias=True)
        c.base.weight = groups(m, n, k, blocksize, i).weight
        multi_tools.check_multi(c.to(device))


@pytest.mark.parametrize(("m", "dtype"), grid([3, 20], HALVES))
def test_dora(device: str, m: int, dtype: torch.dtype) -> None:
    for i, (n, k, blocksize) in enumerate([(64, 128, 64), (7, 192, 32), (13, 2048, 128)]):
        c = groups(m, n, k, blocksize, i, dtype=dtype, r=4 + 6 * i, ab=FLOATS[i], bias=i != 2).to(device)
        dora_tools.check(c, dora_tools.make_gain(n).to(device))


# ---- the same bits, no races -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("m", "k"), [(3, 2176), (20, 256)])
def test_in_any_order_of_threads(simt, seed: int, m: int, k: int) -> None:
    c = groups(m, 40, k, 128, dtype=F16, r=9, p=0.1, bias=True)
    with use_backend("cuda"):
        simt.pk_simt_set_seed(0)
        first = run(c)
        simt.pk_simt_set_seed(seed + 1)
        for got, want in zip(run(c), first, strict=True):
            assert_same_bits(got, want)


def test_no_races(races) -> None:
    with use_backend("cuda"):
        for order, (m, n, k, blocksize) in enumerate([(1, 33, 160, 32), (5, 36, 128, 64), (17, 20, 128, 64)]):
            races.pk_simt_set_seed(order)
            c = groups(m, n, k, blocksize, order, r=5, p=0.1, bias=True)
            run(c)
            dora_tools.check_norm(c)
            dequantize_4bit(random_affine_weight(n, k, "int4", blocksize), BF16)


@pytest.mark.slow
def test_nothing_out_of_bounds() -> None:
    one_of_each = by_form(short="stacked and simt-8", full_form="(split or stacked) and simt-8")
    tools["under_asan"](__file__, "-k", f"rows_are_decoded or norms or anywhere or {one_of_each}")


# ---- what it does not serve ------------------------------------------------------------------------------------------
def test_reasons(simt) -> None:
    def why(n: int, k: int, blocksize: int, **kind: bool) -> str:
        c = make(2, n, k, dtype=BF16, r=2)
        weight = random_affine_weight(n, k, "int4", blocksize, **kind).flatten()
        return explain("lora_linear", c.x, *weight, n, c.a, c.b, 1.0, None, 0.0, None)["cuda"]

    with use_backend("cuda"):
        assert why(8, 128, 64) == "chosen"
        assert why(8, 128, 64, act_order=True).startswith("serves groups of neighbouring columns only")
        for k, blocksize in ((96, 64), (96, 96), (64, 16)):
            assert why(8, k, blocksize).endswith(f"these are of {blocksize} in {k}")
        int8 = random_affine_weight(8, 128, "int8", 64)
        with pytest.raises(BackendUnavailable, match="does not read weights in int8"):
            dequantize_4bit(int8)


def test_errors_name_what_came(simt) -> None:
    c = groups(1, 8, 128, 64)
    own, y, s = cuda.forward_arguments(c.x, *c.weight, c.n, c.a, c.b, c.scaling, c.bias, c.p, c.seed)

    def call(i: int, value: object) -> None:
        packed = cuda.pack(0, c.x, *own[:i], value, *own[i + 1 :], y=y, s=s)
        native.check(simt.pk_cuda_lora_linear(cuda.with_tail(packed, own[5]), 0, None), "cuda")

    with pytest.raises(native.NativeError, match="K must be a multiple of blocksize where groups are of columns, got"):
        call(6, 256)
    with pytest.raises(native.NativeError, match="serves groups of neighbouring columns only"):
        call(3, torch.zeros(128, dtype=torch.int32))
    with pytest.raises(native.NativeError, match="scales must be float32, bfloat16 or float16, got 3"):
        call(1, own[1].double())
    with pytest.raises(native.NativeError, match="zeros must be uint8 or of the dtype of scales, got 2"):
        call(2, own[2].half())
    out = torch.empty(8, 128)
    packed = cuda.pack(0, c.x, *own)
    for args, text in (((packed, 3, out.data_ptr()), "out_dtype"), ((packed, 0, None), "a pointer is NULL"),
                       ((None, 0, None), "no arguments")):  # fmt: skip
        with pytest.raises(native.NativeError, match=f"dequantize_rows: {text}"):
            native.check(simt.pk_cuda_dequantize_rows(*args, 0, None), "cuda")
