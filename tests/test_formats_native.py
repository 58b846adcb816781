"""Every operator over every format of weights in the native library, at every level, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from format_ops import CALLS, IN_GROUPS, A, B, K, N, hold, some
from forms import grid

import peft_kernels as pk
from peft_kernels import dequantize_4bit, native, use_backend
from peft_kernels.formats import FORMATS
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_affine_weight, random_quant_weight

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
LEVELS = [] if native.available() else list(native.levels())


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.level()
    native.set_level(request.param)
    yield request.param
    native.set_level(before)


@pytest.mark.parametrize(
    ("name", "op", "level", "rows", "dtype"),
    grid(IN_GROUPS, list(CALLS), LEVELS, [1, 3, 7, 14, 70], [torch.float32, torch.bfloat16], strength=1),
    indirect=["level"],
)
def test_operators(name: str, op: str, level: str, rows: int, dtype: torch.dtype) -> None:
    hold(CALLS[op], some(rows, K, seed=rows).to(dtype), random_quant_weight(N, K, quant_type=name, seed=4), "native")


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
            hold(CALLS["lora_linear"], some(rows, K), w, "native")


@pytest.mark.parametrize(
    ("quant_type", "level", "zeros", "shifts", "group"),
    grid(["int4", "int8", "uint8"], LEVELS, ["codes", "values", None], [False, True], [16, 48, 64, K], strength=1),
    indirect=["level"],
)
def test_few_rows_of_integers_in_groups_of_any_size(
    quant_type: str, level: str, zeros: str | None, shifts: bool, group: int
) -> None:
    w = random_affine_weight(N, K, quant_type, group, zeros=zeros, shifts=shifts)
    for rows in (4, 6):
        hold(CALLS["lora_linear"], some(rows, K), w, "native")


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
