"""CUDA backend of dora_linear, dora_norm and squared_row_norms: the host build of its sources (csrc/simt); the same
tests on a GPU where there is one."""

from __future__ import annotations

import runpy
from pathlib import Path

import dora_tools
import pytest
import torch
from lora_tools import BF16, F16, F32, FLOATS, Case, make
from torch import Tensor

from peft_kernels import use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.ops import dora_linear as op
from peft_kernels.ops import dora_norm as norm_op
from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed, device = (tools[name] for name in ("simt", "races", "seed", "device"))
HALVES = (BF16, F16)
BACKWARD_ON_REFERENCE = {"dora_linear": "cuda", "dora_linear_backward": "reference"}


def check(c: Case, device: str) -> None:
    dora_tools.check(c.to(device), dora_tools.make_gain(c.n).to(device))


# ---- dora_norm -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_norms(device: str, quant: str) -> None:
    shapes = [(64, 128, 16, 64), (37, 776, 5, 32), (5, 77, 3, 64), (1, 1, 1, 64), (33, 36, 20, 4096), (7, 512, 33, 256)]
    for i, (n, k, r, blocksize) in enumerate(shapes):
        c = make(1, n, k, quant=quant, blocksize=blocksize, nested=i % 2 == 0, r=r, ab=FLOATS[i % 3]).to(device)
        assert_same_bits(dora_tools.check_norm(c, base_sq=True), dora_tools.check_norm(c))


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-6, 0.0])
def test_norms_where_the_terms_cancel(device: str, share: float) -> None:
    dora_tools.check_norm(dora_tools.cancelling(12, 64, 64, share, quant="nf4", nested=True).to(device))


def test_norms_of_nothing(device: str) -> None:
    for n, k, r in ((0, 64, 2), (3, 64, 0), (3, 0, 2)):
        c = make(1, n, k, r=2).to(device)
        c.a, c.b = torch.ones(r, k, device=device), torch.ones(n, r, device=device)
        dora_tools.check_norm(c)


def test_norms_of_storage_that_starts_anywhere(device: str) -> None:
    c = make(1, 20, 128, nested=True, r=3).to(device)
    first = dora_tools.check_norm(c)
    for name in ("weight", "a"):
        t = c.weight[0] if name == "weight" else c.a
        moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape).copy_(t)
        c.weight, c.a = ((moved, *c.weight[1:]), c.a) if name == "weight" else (c.weight, moved)
        assert_same_bits(dora_tools.check_norm(c), first)


# ---- dora_linear -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 40])
def test_linear(device: str, m: int, dtype: torch.dtype) -> None:
    for i, (n, k) in enumerate([(64, 128), (7, 192), (13, 77)]):
        check(make(m, n, k, dtype=dtype, nested=i != 1, r=4 + 12 * i, ab=FLOATS[i], bias=i != 2), device)


@pytest.mark.parametrize("m", [1, 8, 20])
def test_rows_of_w_are_split(device: str, m: int) -> None:
    check(make(m, 40, 4096, dtype=BF16, nested=True, r=8, bias=True), device)


def test_more_rows_than_the_backward_takes(device: str) -> None:
    with use_backend(**BACKWARD_ON_REFERENCE):
        check(make(130, 72, 128, dtype=BF16, r=8, bias=True), device)
        check(make(70, 39, 1600, dtype=BF16, r=8, bias=True), device)  # a kernel of its own adds parts of h


def test_no_rows(device: str) -> None:
    check(make(0, 20, 64, dtype=BF16, r=3), device)


def test_only_what_is_asked_for(device: str) -> None:
    c, gain = make(5, 36, 128, dtype=F16, r=4).to(device), dora_tools.make_gain(36).to(device)
    y, h, s = dora_tools.forward(c, gain, op.forward_op.op)
    bare, none, _ = dora_tools.forward(c, gain, op.forward_op.op, need_h=False)
    assert_same_bits(bare, y)
    assert none.numel() == 0
    args = (c.dy, c.x, *c.weight, c.a, c.b, gain, h, s, c.scaling, c.p, c.seed)
    every = op.backward_op.op(*args, True, True, True)
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        got = op.backward_op.op(*args, *asked)
        for wanted, one, full in zip((asked[0], asked[1], asked[1], asked[2]), got, every, strict=True):
            assert one.numel() == 0 or wanted
            if wanted:
                assert_same_bits(one, full)


def test_what_is_not_served_says_why(device: str) -> None:
    gain = dora_tools.make_gain(8).to(device)
    cases = [
        (make(2, 8, 64, dtype=BF16, r=2, p=0.1), "dropout"),
        (make(2, 8, 64, dtype=BF16, r=2, quant="dense"), "4-bit"),
        (make(600, 8, 64, dtype=BF16, r=2), "512 rows"),
        (make(2, 8, 64, dtype=F32, r=2), "float32"),
    ]
    for c, why in cases:
        with pytest.raises(BackendUnavailable, match=why):
            dora_tools.forward(c.to(device), gain, op.forward_op.op)
    dense = make(1, 8, 64, r=2, quant="dense").to(device)
    with pytest.raises(BackendUnavailable, match="does not serve"):
        norm_op.norm_op.op(*dora_tools.norm_args(dense))


# ---- the same bits ---------------------------------------------------------------------------------------------------
def run(c: Case) -> tuple[Tensor, ...]:
    gain = dora_tools.make_gain(c.n)
    with use_backend("cuda"):
        y, h, s = dora_tools.forward(c, gain, op.forward_op.op)
        norm = norm_op.norm_op.op(*dora_tools.norm_args(c))
        return y, h, s, norm, *dora_tools.backward(c, gain, h, s, op.backward_op.op)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 40, 2080), (40, 36, 192)])
def test_in_any_order_of_threads(simt, seed: int, m: int, n: int, k: int) -> None:
    c = make(m, n, k, dtype=F16, r=9, nested=True, bias=True)
    simt.pk_simt_set_seed(0)
    first = run(c)
    simt.pk_simt_set_seed(seed + 1)
    for got, want in zip(run(c), first, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize(("m", "n", "k"), [(2, 33, 160), (17, 20, 128), (3, 5, 23)])
def test_no_races(races, m: int, n: int, k: int) -> None:
    races.pk_simt_set_seed(m)
    run(make(m, n, k, dtype=BF16, r=5, nested=True, bias=True))


@pytest.mark.slow
def test_nothing_out_of_bounds() -> None:
    tools["under_asan"](__file__, "-k", "norms or split or test_linear and (3-torch.float16 or 9-torch.float16)")
