"""CUDA backend of multi_lora_linear: the host build of its sources (csrc/simt); the same tests on a GPU where there is
one. What is lora_linear's, decoding and the matrix products, tests/test_lora_simt.py and test_lora_mma_simt.py hold."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_tools import BF16, F16, FLOATS
from multi_tools import MultiCase, check_multi, make_multi
from torch import Tensor

from peft_kernels import explain, native, use_backend
from peft_kernels.ops import lora_linear as single
from peft_kernels.ops import multi_lora_linear as op
from peft_kernels.ops.lora_linear import cuda
from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed, device = (tools[name] for name in ("simt", "races", "seed", "device"))
HALVES = (BF16, F16)
RANKS = [4, 64, 0, 1, 17, 9]


def make(m: int, n: int, k: int, ranks: list[int] = RANKS, quant: str = "nf4", **options: object) -> MultiCase:
    return make_multi(m, n, k, ranks, quant=quant, **options)


@contextmanager
def served(m: int) -> Iterator[None]:
    """The backend forced, but for a backward of more rows than it takes."""
    backward = "cuda" if m <= cuda.BACKWARD_ROWS else "reference"
    with use_backend(multi_lora_linear="cuda", multi_lora_linear_backward=backward):
        yield


def check(c: MultiCase) -> None:
    with served(c.base.x.shape[0]):
        check_multi(c)


def run(c: MultiCase) -> tuple[Tensor, ...]:
    """Everything that a forward and a backward return."""
    with served(c.base.x.shape[0]):
        y, s = c.forward(op.forward_op.op)
        return y, s, *c.backward(op.backward_op.op, s)


def assert_all_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


# ---- against float64 -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_few_rows(device: str, m: int, dtype: torch.dtype) -> None:
    """One and two sets of columns, blocks shared by one, two and four lanes, element by element."""
    for i, (n, k) in enumerate([(64, 128), (33, 96), (7, 192), (13, 77)]):
        c = make(m, n, k, dtype=dtype, nested=i % 2 == 0, ab=FLOATS[i % 3], blocksize=32 if k == 96 else 64, bias=True,
                 p=0.25 * (i % 2), seed=i)  # fmt: skip
        check(c.to(device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [9, 20, 40, 64])
def test_more_rows(device: str, m: int, dtype: torch.dtype) -> None:
    """Tiles of 16, 32 and 64 rows; features and columns that fill none."""
    for i, (n, k) in enumerate([(72, 128), (37, 77)]):
        c = make(m, n, k, RANKS[:5] if i else RANKS, dtype=dtype, nested=i == 0, ab=FLOATS[(m + i) % 3], bias=i == 0,
                 p=0.3 * i, seed=m)  # fmt: skip
        check(c.to(device))


def test_most_rows(device: str) -> None:
    """The tile of 128 rows, and rows beyond the backward's."""
    check(make(130, 40, 128, [3, 8], dtype=BF16, nested=True).to(device))
    check(make(512, 8, 32, [2, 5, 1], dtype=F16, bias=True).to(device))


@pytest.mark.parametrize("m", [20, 40])
def test_tiles_where_memory_is_short(simt, m: int) -> None:
    simt.pk_simt_set_device(89, 108)
    with use_backend("cuda"):
        check(make(m, 72, 128, dtype=BF16, nested=True, bias=True))


@pytest.mark.parametrize("m", [8, 24])
def test_rows_of_w_are_split(device: str, m: int) -> None:
    check(make(m, 40, 2080, [8, 16, 3], dtype=BF16, nested=True, bias=True).to(device))


@pytest.mark.parametrize("m", [6, 33])
def test_one_adapter_for_all_and_one_for_each(device: str, m: int) -> None:
    for rows in ([0] * m, list(range(m)), [-1] * m, [m - 1, *range(m - 1)], [i % 3 for i in range(m)]):
        check(make(m, 36, 64, [1 + i % 6 for i in range(m)], dtype=BF16, adapters=rows).to(device))


@pytest.mark.parametrize("offset", [1, 3])
def test_storage_that_starts_anywhere(device: str, offset: int) -> None:
    """Views into larger buffers: nothing is aligned to a vector."""

    def shifted(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + offset, dtype=t.dtype, device=t.device)[offset:].view(t.shape).copy_(t)

    for m in (2, 12):
        c = make(m, 40, 128, dtype=BF16, ab=BF16, bias=True, p=0.2).to(device)
        c.stack = replace(c.stack, a=shifted(c.stack.a), b=shifted(c.stack.b))
        check(c)
        c.base.x, c.base.dy = shifted(c.base.x), shifted(c.base.dy)
        check(c)


# ---- which adapter, and whose rows -----------------------------------------------------------------------------------
@pytest.mark.parametrize("m", [8, 16])
def test_what_does_not_exist_is_the_base(device: str, m: int) -> None:
    """Indices, ranks and starts out of range, free slots: the forward's and the backward's bits of -1."""
    c = make(m, 24, 64, [3, 0, 5, 4, 4], dtype=BF16, bias=True, max_rank=5).to(device)
    c.stack.ranks[2], c.stack.starts[3], c.stack.starts[4] = 6, c.stack.a.shape[0] - 3, -1
    c.adapters = torch.tensor([0, 1, 2, 3, 4, 5, -7, 2**40] * (m // 8), device=device)
    base = replace(c, adapters=torch.where(c.adapters == 0, 0, -1))
    got = run(c)
    assert_all_same(got, run(base))
    assert not got[1][c.adapters != 0].any()
    assert got[1][c.adapters == 0, :3].all()
    assert not got[1][:, 3:].any()


@pytest.mark.parametrize(("m", "n", "k"), [(8, 40, 128), (30, 40, 128), (30, 21, 45)])
def test_rows_do_not_depend_on_their_neighbours(device: str, m: int, n: int, k: int) -> None:
    """Rows in another order, with other adapters among them, give the same bits in that order."""
    c = make(m, n, k, dtype=BF16, nested=True).to(device)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m)).to(device)
    moved = replace(c, base=replace(c.base, x=c.base.x[order], dy=c.base.dy[order]), adapters=c.adapters[order])
    first, second = run(c), run(moved)
    assert_all_same(second[:3], tuple(t[order] for t in first[:3]))
    other = replace(c, adapters=torch.where(torch.arange(m, device=device) % 2 == 0, c.adapters, 3))
    third = run(other)
    assert_all_same(tuple(t[::2] for t in third[:3]), tuple(t[::2] for t in first[:3]))


@pytest.mark.parametrize("m", [1, 7, 20])
def test_one_adapter_is_lora_linears(device: str, m: int) -> None:
    """s and the gradients of a and b have lora_linear's bits: the sums have one order, whoever else is in the batch."""
    c = make(m, 36, 136, [5], dtype=BF16, adapters=[0] * m, ab=BF16, p=0.2, nested=True).to(device)
    y, s, dx, da, db = run(c)
    own = slice(int(c.stack.starts[0]), int(c.stack.starts[0]) + 5)
    plain = replace(c.base, a=c.stack.a[own], b=c.stack.b[own].t().contiguous(), scaling=float(c.stack.scaling[0]))
    want_y, want_s = plain.forward(single.forward_op.op)
    want = plain.backward(single.backward_op.op, want_s)
    assert_same_bits(s, want_s)
    assert_same_bits(da[own], want[1])
    assert_same_bits(db[own].t().contiguous(), want[2])
    assert y.shape == want_y.shape
    assert dx.shape == want[0].shape


# ---- the same bits ---------------------------------------------------------------------------------------------------
SAME = [(3, 40, 2080, 64), (8, 33, 100, 64), (40, 68, 192, 32)]


@pytest.mark.parametrize(("m", "n", "k", "blocksize"), SAME)
def test_again(device: str, m: int, n: int, k: int, blocksize: int) -> None:
    c = make(m, n, k, dtype=BF16, blocksize=blocksize, p=0.1, nested=True, bias=True).to(device)
    assert_all_same(run(c), run(c))


@pytest.mark.parametrize(("m", "n", "k", "blocksize"), SAME)
def test_in_any_order_of_threads(simt, seed: int, m: int, n: int, k: int, blocksize: int) -> None:
    c = make(m, n, k, [3, 8, 1, 0], dtype=F16, blocksize=blocksize, p=0.1, nested=True, bias=True)
    simt.pk_simt_set_seed(0)
    first = run(c)
    simt.pk_simt_set_seed(seed + 1)
    assert_all_same(run(c), first)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 33, 160), (5, 5, 23), (2, 40, 2048), (12, 20, 64), (34, 9, 32)])
def test_no_races(races, m: int, n: int, k: int) -> None:
    races.pk_simt_set_seed(m)
    run(make(m, n, k, [3, 0, 9], dtype=BF16, p=0.1, nested=m % 2 == 0, bias=True))


@pytest.mark.slow
def test_nothing_out_of_bounds() -> None:
    one_of_each = "few_rows and simt-5-torch.bfloat16 or more_rows and simt-9-torch.float16"
    tools["under_asan"](__file__, "-k", f"{one_of_each} or does_not_exist and simt-8")


# ---- empty, and in part ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("m", "n", "k", "ranks"), [
    (0, 20, 64, [4]), (3, 0, 64, [4]), (3, 20, 0, [4]), (3, 20, 64, [0, 0]), (3, 20, 64, []), (12, 0, 64, [2]),
])  # fmt: skip
@pytest.mark.parametrize("most", [None, 6])
def test_nothing_of_something(device: str, m: int, n: int, k: int, ranks: list[int], most: int | None) -> None:
    rows = [-1] * m if not ranks else [i % len(ranks) for i in range(m)]
    c = make(m, n, k, ranks, dtype=BF16, p=0.5, bias=True, adapters=rows, max_rank=most).to(device)
    check(c)
    c.stack = replace(c.stack, a=c.stack.a[:0], b=c.stack.b[:0], ranks=torch.zeros_like(c.stack.ranks))
    check(c)


@pytest.mark.parametrize("m", [4, 20])
def test_one_gradient_without_the_other(device: str, m: int) -> None:
    c = make(m, 40, 128, dtype=BF16, p=0.1).to(device)
    _, s, dx, da, db = run(c)
    only_dx, only_ab = c.backward(op.backward_op.op, s, True, False), c.backward(op.backward_op.op, s, False, True)
    assert_same_bits(only_dx[0], dx)
    assert_all_same(only_ab[1:], (da, db))
    assert only_dx[1].numel() == only_dx[2].numel() == only_ab[0].numel() == 0


def test_opcheck(device: str) -> None:
    c = make(3, 24, 64, [4, 2], dtype=BF16, p=0.1, bias=True).to(device)
    tests = ("test_schema", "test_faketensor")
    c.forward(lambda *args: torch.library.opcheck(op.forward_op.op, args, test_utils=tests))
    s = c.forward(op.forward_op.op)[1]
    c.backward(lambda *args: torch.library.opcheck(op.backward_op.op, args, test_utils=tests), s)


# ---- what it does not serve ------------------------------------------------------------------------------------------
def reasons(c: MultiCase) -> tuple[str, str]:
    s = torch.empty(c.base.x.shape[0], c.stack.max_rank)
    return (
        c.forward(lambda *args: explain("multi_lora_linear", *args)["cuda"]),
        c.backward(lambda *args: explain("multi_lora_linear_backward", *args)["cuda"], s),
    )


def test_reasons(simt) -> None:
    with use_backend("cuda"):
        assert reasons(make(8, 8, 64, dtype=BF16)) == ("chosen", "chosen")
        assert reasons(make(513, 8, 64, dtype=BF16))[0] == "serves up to 512 rows of x, these are 513"
        assert reasons(make(65, 8, 64, dtype=BF16))[1] == "serves up to 64 rows of x, these are 65"
        for c, text in (
            (make(1, 8, 64), "does not serve torch.float32"),
            (make(1, 8, 64, dtype=BF16, quant="dense"), "serves 4-bit weights only, this one is dense"),
            (make(1, 8, 64, dtype=BF16, ab=torch.float64), "does not serve a in torch.float64"),
        ):
            assert all(why.startswith(text) for why in reasons(c)), reasons(c)


def test_a_gain_is_for_one_adapter(simt) -> None:
    c, y, s = make(2, 8, 64, dtype=BF16), torch.empty(2, 8, dtype=BF16), torch.empty(2, 64)
    packed = cuda.pack(0, c.base.x, *c.base.weight, c.base.n, c.stack.a, c.stack.b, 1.0, None, 0.0, None, y=y, s=s,
                       gain=torch.ones(8), plan=c.plan)  # fmt: skip
    with pytest.raises(native.NativeError, match="serves a gain with one adapter only"):
        native.check(simt.pk_cuda_lora_linear(cuda.with_tail(packed, 1), 0, None), "cuda")


# ---- on a GPU only ---------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("m", [8, 64])
def test_in_a_cuda_graph(m: int) -> None:
    """Recorded once; replayed with other adapters for other rows it gives what direct calls give."""
    ranks = [16, 8, 64, 4]
    c = make(m, 1024, 2048, ranks, dtype=BF16, ab=BF16, p=0.1, nested=True, bias=True).to("cuda")
    other = make(m, 1024, 2048, ranks[::-1], dtype=BF16, ab=BF16, p=0.1, nested=True, bias=True, seed=5).to("cuda")
    run(c)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(c)
    for name in ("a", "b", "starts", "ranks", "scaling"):
        getattr(c.stack, name).copy_(getattr(other.stack, name))
    c.adapters.copy_(other.adapters)
    c.base.x.copy_(other.base.x)
    graph.replay()
    assert_all_same(recorded, run(c))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "count"), [(8, 8), (64, 64), (256, 16)])
def test_of_a_models_size(m: int, count: int) -> None:
    check(make(m, 4096, 4096, [16] * count, dtype=BF16, ab=BF16, nested=True).to("cuda"))
