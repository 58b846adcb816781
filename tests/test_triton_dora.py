"""dora_norm, squared_row_norms and dora_linear on Triton against float64: in Triton's interpreter, and on a GPU.

As test_triton_lora_linear.py: in an ordinary run `test_in_the_interpreter` starts a process on this same file, in which
Triton interprets, and what is below is marked `gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import dora_tools
import pytest
import torch
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter
from lora_tools import BF16, F16, make

import peft_kernels as pk
from peft_kernels import tuning
from peft_kernels.ops import dora_linear as linear_op
from peft_kernels.ops import dora_norm as norm_op
from peft_kernels.ops import lora_linear as lora_op
from peft_kernels.testing import assert_no_worse, assert_same_bits

pytest.importorskip("triton", reason="Triton is not installed")
# small tiles, so that small shapes have several of everything
SMALL: dict[str, dict[str, int]] = {
    "project": {"BM": 16, "BK": 32, "BR": 16, "programs": 6},
    "outer": {"BM": 16, "BN": 32, "BR": 16, "programs": 6},
    "forward": {"BM": 16, "BN": 32, "BK": 32, "BR": 16, "GROUP": 2, "programs": 1},
    "backward": {"BM": 16, "BN": 32, "BK": 32, "BR": 16, "GROUP": 2, "programs": 6},
    "dora_norm": {"BN": 16, "BK": 64, "BR": 16, "programs": 6},
}


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """Every test below, on CPU tensors."""
    run_in_the_interpreter(__file__, "not the_interpreter")


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with ExitStack() as stack:
        for kernel, values in SMALL.items():
            stack.enter_context(tuning.override(kernel, **values))
        stack.enter_context(pk.use_backend("triton"))
        yield


NORMS: dict[str, dict[str, Any]] = {
    "whole blocks": {"n": 37, "k": 192, "r": 5, "nested": True},
    "large block": {"n": 18, "k": 256, "r": 16, "blocksize": 256},
    "small block, fp4": {"n": 20, "k": 96, "r": 40, "blocksize": 32, "quant": "fp4"},
    "blocks straddle rows": {"n": 21, "k": 98, "r": 4, "nested": True},
    "odd": {"n": 7, "k": 35, "r": 1},
    "dense": {"n": 33, "k": 70, "r": 3, "quant": "dense"},
    "dense bfloat16": {"n": 20, "k": 130, "r": 17, "quant": "dense", "w_dtype": BF16, "ab": BF16},
}


@on_device
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    c = make(1, **NORMS[name]).to(DEVICE)
    first = dora_tools.check_norm(c)
    assert_same_bits(dora_tools.check_norm(c, base_sq=True), first)


@on_device
@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-6, 0.0])
def test_norms_where_the_terms_cancel(share: float) -> None:
    for kind in ({"quant": "dense"}, {"quant": "nf4", "nested": True}):
        c = dora_tools.cancelling(12, 64, 4 if kind["quant"] == "dense" else 64, share, **kind)
        dora_tools.check_norm(c.to(DEVICE))


@on_device
def test_norms_of_nothing() -> None:
    for n, k, r in ((0, 64, 3), (5, 0, 3), (5, 64, 0)):
        w, a, b = torch.randn(n, k, device=DEVICE), torch.randn(r, k, device=DEVICE), torch.randn(n, r, device=DEVICE)
        exact = w.double().norm(dim=1)
        assert_no_worse(pk.dora_norm(w, a, b), exact.float(), exact)
        assert pk.squared_row_norms(w).shape == (n,)


@on_device
def test_a_dense_weight_has_no_blocks() -> None:
    """Their sizes are of no meaning there, and any number may come."""
    w, x = torch.randn(31, 104, device=DEVICE), torch.randn(3, 104, device=DEVICE)
    parts = (None, None, None, None, 0)
    first = norm_op.squares_op.op(w, *parts, 64, 256, 31, 104)
    y, _ = lora_op.forward_op.op(x, w, *parts, 64, 256, 31, None, None, 1.0, None, 0.0, None)
    for sizes in ((-1, 256), (0, 0), (7, -3)):
        assert_same_bits(norm_op.squares_op.op(w, *parts, *sizes, 31, 104), first)
        again, _ = lora_op.forward_op.op(x, w, *parts, *sizes, 31, None, None, 1.0, None, 0.0, None)
        assert_same_bits(again, y)


@on_device
def test_norms_of_float64_are_refused() -> None:
    c = make(1, 8, 64, r=2).to(DEVICE)
    with pytest.raises(pk.BackendUnavailable, match=r"does not serve a in torch\.float64"):
        norm_op.norm_op.op(*c.weight, c.a.double(), c.b.double(), 1.0, None)


# name: rows and the rest of `make`
LINEARS: dict[str, tuple[int, dict[str, Any]]] = {
    "one row": (1, {"n": 70, "k": 128, "r": 8, "dtype": BF16, "p": 0.2}),
    "no rows": (0, {"n": 20, "k": 64, "r": 4, "dtype": BF16, "p": 0.2}),
    "aligned": (32, {"n": 64, "k": 128, "r": 16, "dtype": F16, "nested": True, "bias": True}),
    "nothing aligned": (19, {"n": 37, "k": 101, "r": 5, "dtype": BF16, "p": 0.3, "bias": True}),
    "blocks straddle rows": (19, {"n": 50, "k": 98, "r": 20, "dtype": F16, "p": 0.3}),
    "half adapter": (20, {"n": 48, "k": 64, "r": 16, "dtype": BF16, "ab": BF16, "bias": True}),
    "dense": (20, {"n": 37, "k": 101, "r": 9, "dtype": BF16, "w_dtype": BF16, "quant": "dense", "p": 0.1}),
    "float32": (19, {"n": 37, "k": 101, "r": 5, "p": 0.3, "bias": True}),
    "float32 dense": (20, {"n": 48, "k": 72, "r": 17, "quant": "dense", "bias": True}),
}


@on_device
@pytest.mark.parametrize("name", LINEARS)
def test_linear(name: str) -> None:
    m, kind = LINEARS[name]
    c = make(m, **kind).to(DEVICE)
    dora_tools.check(c, dora_tools.make_gain(c.n).to(DEVICE))


@on_device
@pytest.mark.parametrize("name", ["aligned", "nothing aligned", "float32"])
def test_linear_in_parts(name: str) -> None:
    """The rows of W split over programs: gain_kernel ends what forward_kernel began."""
    m, kind = LINEARS[name]
    c = make(m, **kind).to(DEVICE)
    with tuning.override("forward", programs=12):
        dora_tools.check(c, dora_tools.make_gain(c.n).to(DEVICE))


@on_device
@pytest.mark.parametrize("name", ["aligned", "blocks straddle rows", "dense"])
def test_linear_by_panels(name: str) -> None:
    m, kind = LINEARS[name]
    c = make(m, **kind).to(DEVICE)
    with tuning.override("panels", from_M=1, from_M_dense=1, elements=64 * 128):
        dora_tools.check(c, dora_tools.make_gain(c.n).to(DEVICE))


@on_device
def test_only_what_is_asked_for() -> None:
    c = make(9, 40, 64, r=4, dtype=F16).to(DEVICE)
    gain = dora_tools.make_gain(40).to(DEVICE)
    y, h, s = dora_tools.forward(c, gain, linear_op.forward_op.op)
    bare, none, _ = dora_tools.forward(c, gain, linear_op.forward_op.op, need_h=False)
    assert_same_bits(bare, y)
    assert none.numel() == 0
    args = (c.dy, c.x, *c.weight, c.a, c.b, gain, h, s, c.scaling, c.p, c.seed)
    _, da, db, dgain = linear_op.backward_op.op(*args, True, True, True)
    dx, *others = linear_op.backward_op.op(*args, True, False, False)
    assert dx.shape == c.x.shape
    assert all(t.numel() == 0 for t in others)
    no_dx, only_da, only_db, no_dgain = linear_op.backward_op.op(*args, False, True, False)
    assert no_dx.numel() == no_dgain.numel() == 0
    assert_same_bits(only_da, da)
    assert_same_bits(only_db, db)
    assert_same_bits(linear_op.backward_op.op(*args, False, False, True)[3], dgain)
