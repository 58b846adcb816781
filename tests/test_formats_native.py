"""Every operator over every format of weights in the native library, at every level, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from forms import grid
from torch import Tensor

import peft_kernels as pk
from peft_kernels import AdapterStack, Projection, QuantWeight, dequantize_4bit, native, use_backend
from peft_kernels.formats import FORMATS
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_affine_weight, random_quant_weight

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
LEVELS = [] if native.available() else list(native.levels())
IN_GROUPS = sorted(name for name, known in FORMATS.items() if known.number > 2)
N, K, E = 40, 512, 2
Weight = QuantWeight | Tensor


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.level()
    native.set_level(request.param)
    yield request.param
    native.set_level(before)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


A, B, BIAS = some(4, K, seed=1).abs(), some(N, 4, seed=2).abs(), some(N, seed=3)


def stacked(x: Tensor, w: Weight) -> Tensor:
    dense = some(24, K, seed=9).abs().to(x.dtype)
    return torch.cat(pk.lora_linear_stacked(x, [Projection(w, A, B), Projection(dense), Projection(w)]), -1)


def multi(x: Tensor, w: Weight) -> Tensor:
    stack = AdapterStack.pack([(A, B, 0.5), (A[:2], B[:, :2], 1.0)])
    return pk.multi_lora_linear(x, w, stack, torch.arange(len(x)) % 3 - 1)


def grouped(x: Tensor, w: Weight) -> Tensor:
    offsets = torch.tensor([0, len(x) // 2, len(x)])
    return pk.grouped_linear(x, w, offsets, A.expand(E, 4, K), B[: N // E].expand(E, N // E, 4))


def dora(x: Tensor, w: Weight) -> Tensor:
    return pk.dora_linear(x, w, A, B, BIAS.abs() + 1, None, 0.5, BIAS, 0.2, torch.tensor([3]))


CALLS: dict[str, Callable[[Tensor, Weight], Tensor]] = {
    "lora_linear": lambda x, w: pk.lora_linear(x, w, A, B, 0.5, BIAS),
    "lora_linear_stacked": stacked,
    "multi_lora_linear": multi,
    "lora_mixture": lambda x, w: pk.lora_mixture(x, w, [A, A], [B, B], some(len(x), 2).abs()),
    "dora_linear": dora,
    "butterfly_linear": lambda x, w: pk.butterfly_linear(x, w, torch.eye(32).expand(1, K // 32, 32, 32) * 0.9, BIAS),
    "grouped_linear": grouped,
}


def both(
    call: Callable[[Tensor, Weight], Tensor], x: Tensor, w: Weight, positive: bool = False
) -> tuple[Tensor, Tensor]:
    """(y, dx); positive: of a dy without signs"""
    x = x.clone().requires_grad_()
    y = call(x, w)
    dy = some(*y.shape, seed=7).to(y.dtype)
    (dx,) = torch.autograd.grad(y, x, dy.abs() if positive else dy)
    return y.detach(), dx


def hold(call: Callable[[Tensor, Weight], Tensor], x: Tensor, w: QuantWeight) -> None:
    with use_backend("reference"):
        eager = both(call, x, w)
        dense = dequantize_4bit(w, torch.float64)
        if w.shape == (N, K) and call is grouped:
            dense = dense.view(E, N // E, K)
        exact = both(call, x.double(), dense)
        size = both(call, x.double().abs(), dense.abs(), True)
    with use_backend("native"):
        got = both(call, x, w)
    for actual, plain, want, magnitude in zip(got, eager, exact, size, strict=True):
        assert_no_worse(actual, plain, want, magnitude.abs() + want.abs())


@pytest.mark.parametrize(
    ("name", "op", "level", "rows", "dtype"),
    grid(IN_GROUPS, list(CALLS), LEVELS, [1, 3, 7, 70], [torch.float32, torch.bfloat16], strength=1),
    indirect=["level"],
)
def test_operators(name: str, op: str, level: str, rows: int, dtype: torch.dtype) -> None:
    hold(CALLS[op], some(rows, K, seed=rows).to(dtype), random_quant_weight(N, K, quant_type=name, seed=4))


@pytest.mark.parametrize(("name", "level"), grid(sorted(FORMATS), LEVELS, strength=1), indirect=["level"])
def test_dequantize_gives_the_bits_of_the_reference(name: str, level: str) -> None:
    weights = [random_quant_weight(33, 512, quant_type=name)]
    if FORMATS[name].number in (3, 4, 5):
        for zeros in ("codes", "values", None):
            for group, k in ((64, 512), (16, 512), (48, 100), (33, 99), (128, 130)):
                weights += [random_affine_weight(33, k, name, group, zeros=zeros, shifts=shifts, act_order=shifts)
                            for shifts in (False, True)]  # fmt: skip
    for w in weights:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with use_backend("reference"):
                want = dequantize_4bit(w, dtype)
            with use_backend("native"):
                assert_same_bits(dequantize_4bit(w, dtype), want)


@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["int4", "int8", "uint8"])
def test_integers_with_an_order_of_their_own(quant_type: str, scales: torch.dtype) -> None:
    cases = (("values", True, False, 48), ("codes", False, True, 64), (None, True, True, 31))
    for zeros, shifts, order, group in cases:
        w = random_affine_weight(N, K, quant_type, group, zeros=zeros, shifts=shifts, act_order=order, scales=scales)
        for rows in (1, 6, 70):
            hold(CALLS["lora_linear"], some(rows, K), w)


def test_norms_of_rows() -> None:
    for name in IN_GROUPS:
        w = random_quant_weight(N, K, quant_type=name)
        with use_backend("reference"):
            eager = pk.dora_norm(w, A, B), pk.squared_row_norms(w)
            dense = dequantize_4bit(w, torch.float64)
            exact = pk.dora_norm(dense, A, B), pk.squared_row_norms(dense)
        with use_backend("native"):
            got = pk.dora_norm(w, A, B), pk.squared_row_norms(w)
        for actual, plain, want in zip(got, eager, exact, strict=True):
            assert_no_worse(actual, plain, want)


def test_an_index_that_was_overwritten_is_refused_before_it_is_read() -> None:
    w = random_affine_weight(N, K, act_order=True)
    assert w.nested_code is not None
    w.nested_code[5] = 9
    message = r"column 5 is of group 9 \(g_idx\), there are 8"
    with use_backend("native"), pytest.raises(native.NativeError, match=message):
        pk.lora_linear(some(3, K), w)
    w.nested_code[5] = -2
    with use_backend("native"), pytest.raises(native.NativeError, match="column 5 is of group -2"):
        dequantize_4bit(w)


def test_a_prepared_call_serves_them() -> None:
    w = random_quant_weight(N, K, quant_type="q4_k")
    call = pk.PreparedCall(pk.lora_linear)
    for rows in (1, 3):
        x = some(rows, K)
        with torch.no_grad():
            for _ in range(2):
                assert_same_bits(call(x, w, A, B, 0.5), pk.lora_linear(x, w, A, B, 0.5))
