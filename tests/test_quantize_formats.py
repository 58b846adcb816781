"""`QuantWeight.quantize`: the bits of the owners' quantisers, weights that are made in pieces, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, formats, quantize_4bit
from peft_kernels.formats import FORMATS
from peft_kernels.testing import assert_same_bits

ABLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "int4", "int8", "uint8", "nf4", "fp4")
BLOCKS = ABLE[:6]
DTYPES = (torch.float32, torch.bfloat16)


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, and rows that are hard to round: ties, powers of two and their neighbours, zeros, constants."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=g) * 0.05
    powers = 2.0 ** torch.randint(-20, 10, (columns,), generator=g)
    halves = torch.randint(-24, 25, (columns,), generator=g) / 2
    some = (torch.zeros(columns), torch.full((columns,), -0.25), powers, -powers, powers.nextafter(torch.zeros(1)),
            halves, torch.arange(columns) - columns / 2, torch.full((columns,), 1e-36))  # fmt: skip
    w[: len(some)] = torch.stack(some)
    w[8, ::2], w[8, 1::2] = 1, -1
    return w.to(dtype)


def assert_same_weight(got: QuantWeight, want: QuantWeight) -> None:
    assert (got.quant_type, got.blocksize, got.shape, got.dtype) == (
        want.quant_type, want.blocksize, want.shape, want.dtype
    )  # fmt: skip
    for a, b in zip(got.flatten()[:5], want.flatten()[:5], strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert_same_bits(a.reshape(-1), b.reshape(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_of_the_package_gguf(name: str, dtype: torch.dtype) -> None:
    gguf = pytest.importorskip("gguf")
    w = weight(600, 2048, dtype)  # two pieces
    want = gguf.quants.quantize(w.float().numpy(), gguf.GGMLQuantizationType[name.upper()])
    got = QuantWeight.quantize(w, name)
    assert_same_bits(got.packed, torch.from_numpy(want))
    assert (got.shape, got.dtype) == ((600, 2048), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [None, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_hqq(bits: int, blocksize: int | None, dtype: torch.dtype) -> None:
    core = pytest.importorskip("hqq.core.quantize")
    w = weight(600, 2048, dtype)
    layer = torch.nn.Linear(2048, 600, bias=False)
    layer.weight.data = w.clone()
    config = core.BaseQuantizeConfig(nbits=bits, group_size=blocksize or 64, axis=1)
    owner = core.HQQLinear(layer, config, compute_dtype=dtype, device="cpu")
    got = QuantWeight.quantize(w, "int4" if bits == 4 else "uint8", blocksize)
    assert_same_weight(got, formats.from_hqq(owner.W_q, owner.meta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [None, 64])
def test_torchao_int8(blocksize: int | None, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    w = weight(600, 2048, dtype)
    linear = torch.nn.Linear(2048, 600, bias=False)
    linear.weight = torch.nn.Parameter(w.clone())
    sizes: Any = quantization.PerRow() if blocksize is None else quantization.PerGroup(blocksize)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(version=2, granularity=sizes))
    assert_same_weight(QuantWeight.quantize(w, "int8", blocksize), formats.from_torchao(linear.weight))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_nf4_and_fp4_are_those_of_quantize_4bit(name: str) -> None:
    w = weight(16, 64)
    assert_same_weight(QuantWeight.quantize(w, name, 32), quantize_4bit(w, name, 32))


@pytest.mark.parametrize("name", ABLE)
def test_a_weight_comes_back_near_itself(name: str) -> None:
    """No further than the step between two codes of its group, and with a scale for every group."""
    w = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    got = QuantWeight.quantize(w, name)
    assert got.shape == w.shape
    steps = 255 if name in ("int8", "uint8", "q8_0") else 31 if name.startswith("q5") else 15
    width = (w.amax(-1, keepdim=True) - w.amin(-1, keepdim=True)).clamp(min=2 * w.abs().amax(-1, keepdim=True))
    uneven = 4 if name in ("nf4", "fp4", "mxfp4") else 1
    assert bool(((dequantize_4bit(got) - w).abs() <= uneven * width / steps).all())
    assert QuantWeight.quantize(w.double(), name).dtype is torch.float64
    assert QuantWeight.quantize(w[:0], name).shape == (0, 5, 64)


@pytest.mark.parametrize("name", ABLE)
def test_values_that_no_format_holds(name: str) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        w = weight(16, 64)
        w[11, 5] = bad
        with pytest.raises(ValueError, match="w holds 1 values that are not finite"):
            QuantWeight.quantize(w, name)
    with pytest.raises(TypeError, match="floating-point"):
        QuantWeight.quantize(torch.ones(2, 64, dtype=torch.int32), name)


def test_scales_beyond_those_of_float16() -> None:
    w = weight(16, 64)
    w[3, 3] = 1e30
    for name in BLOCKS[:5]:
        with pytest.raises(ValueError, match=f"values too large for {name}.* holds [12] values"):
            QuantWeight.quantize(w, name)
    assert bool(dequantize_4bit(QuantWeight.quantize(w, "mxfp4")).isfinite().all())


@pytest.mark.parametrize("name", [n for n in ABLE if n not in ("nf4", "fp4")])
def test_rows_of_no_whole_groups(name: str) -> None:
    with pytest.raises(ValueError, match=r"of rows in (blocks|groups) of"):
        QuantWeight.quantize(weight(16, 72), name, 32)


def test_formats_without_a_quantiser() -> None:
    for name in ("q4_k", "iq4_nl", "q2_k", "Q8_0"):
        with pytest.raises(ValueError, match=r"one of .*'q8_0'.*which have a quantiser"):
            QuantWeight.quantize(weight(16, 256), name)
    assert {name for name, known in FORMATS.items() if known.quantize} == {*ABLE}
