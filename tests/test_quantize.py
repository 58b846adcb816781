"""quantize_4bit and dequantize_4bit: the format, every backend that runs here, and bitsandbytes as the judge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import NF4_TABLE, QuantWeight, dequantize_4bit, native, quantize_4bit, use_backend
from peft_kernels.formats import BLOCKSIZES, table
from peft_kernels.ops.quantize_4bit import levels
from peft_kernels.testing import assert_same_bits, random_quant_weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
needs_native = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
LEVELS = [] if native.available() else list(native.levels())


@pytest.fixture(params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the native library at each level that this CPU has."""
    if request.param == "reference":
        with use_backend("reference"):
            yield "reference"
        return
    before = native.level()
    native.set_level(request.param)
    try:
        with use_backend("native"):
            yield request.param
    finally:
        native.set_level(before)


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values whose magnitude varies over four decades, so that the blocks' scales do, and some exact zeros."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * torch.exp(2 * torch.randn(shape, generator=g)).clamp(max=100)
    return torch.where(torch.rand(shape, generator=g) < 0.05, 0.0, w).to(dtype)


def assert_same_weight(actual: QuantWeight, expected: QuantWeight) -> None:
    assert (actual.shape, actual.quant_type, actual.blocksize, actual.dtype, actual.nested) == (
        expected.shape,
        expected.quant_type,
        expected.blocksize,
        expected.dtype,
        expected.nested,
    )
    for got, want in zip(actual.flatten(), expected.flatten(), strict=True):
        if isinstance(want, Tensor):
            assert_same_bits(got, want, any_nan=want.is_floating_point())


def reference(w: Tensor, *args: object) -> QuantWeight:
    with use_backend("reference"):
        return quantize_4bit(w, *args)  # type: ignore[arg-type]


# ---- against bitsandbytes ------------------------------------------------------------------------------------------
SHAPES = [(1,), (7,), (64,), (65,), (33, 77), (96, 64), (128, 192), (5, 3, 5, 64), (131, 257)]


@pytest.fixture(scope="module")
def bnb() -> object:
    return pytest.importorskip("bitsandbytes").functional


@lru_cache(maxsize=512)
def _of_bnb(shape: tuple[int, ...], dtype: torch.dtype, quant_type: str, blocksize: int, nested: bool) -> tuple:
    """(w, packed, state), asked of bitsandbytes once for all backends."""
    functional = pytest.importorskip("bitsandbytes").functional
    w = weight(shape, dtype, seed=blocksize)
    return w, *functional.quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_are_bitsandbytes(backend, quant_type, dtype, nested):
    cases = [(64, shape) for shape in SHAPES[:-2]] + list(itertools.product(BLOCKSIZES, [(65,), *SHAPES[-2:]]))
    for blocksize, shape in cases:
        w, packed, state = _of_bnb(shape, dtype, quant_type, blocksize, nested)
        mine = quantize_4bit(w, quant_type, blocksize, nested)
        assert_same_weight(mine, QuantWeight.from_bnb(packed, state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_are_bitsandbytes(backend, bnb, quant_type, dtype, nested):
    # Rows of whole blocks: elsewhere bitsandbytes' AVX-512 kernel reads wrong scales (see dequantize_4bit's docstring).
    for blocksize, rows in itertools.product(BLOCKSIZES, (1, 6)):
        w, packed, state = _of_bnb((rows, 2 * blocksize), dtype, quant_type, blocksize, nested)
        mine = dequantize_4bit(QuantWeight.from_bnb(packed, state))
        with torch.compiler.set_stance("force_eager"):  # it compiles its fallback for large blocks
            theirs = bnb.dequantize_4bit(packed, state).reshape(w.shape)
        # + 0.0: its scalar kernel gives -0.0 for FP4's code 8 where its others give 0.0
        assert_same_bits(mine, theirs + 0.0)


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_extreme_blocks_are_bitsandbytes(backend, bnb, blocksize):
    w = torch.zeros(3 * blocksize)
    w[:blocksize] = torch.linspace(-1, 1, blocksize) * 3e-39  # subnormal, below the least divisor
    w[2 * blocksize :] = torch.linspace(-1, 1, blocksize) * 3e38
    for part in (w, w[: 2 * blocksize - 3], w[: blocksize - 3]):
        for quant_type, nested in itertools.product(("nf4", "fp4"), (False, True)):
            packed, state = bnb.quantize_4bit(
                part, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
            )
            assert_same_weight(quantize_4bit(part, quant_type, blocksize, nested), QuantWeight.from_bnb(packed, state))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_bitsandbytes(backend, bnb, bad):
    for at, quant_type, nested in itertools.product((0, 70, 255, 260), ("nf4", "fp4"), (False, True)):
        w = weight((261,))
        w[at] = bad
        packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=quant_type)
        assert_same_weight(quantize_4bit(w, quant_type, 64, nested), QuantWeight.from_bnb(packed, state))


def test_tables_are_bitsandbytes(bnb):
    for quant_type, name in ((1, "nf4"), (2, "fp4")):
        assert_same_bits(table(quant_type), bnb.get_4bit_type(name, device="cpu"))
    assert_same_bits(levels.nested_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("nested", [False, True])
def test_view_of_params4bit(bnb, nested):
    """`from_bnb` shares every tensor with the Params4bit, and the ops read it as it is."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(96, 40, bias=False, quant_type="nf4", compress_statistics=nested)
    dense = layer.weight.data.clone()
    weight4 = layer.to("cpu").weight
    view = QuantWeight.from_bnb(weight4)
    state = weight4.quant_state
    assert view.packed.data_ptr() == weight4.data.data_ptr()
    assert view.absmax.data_ptr() == state.absmax.data_ptr()
    if nested:
        assert view.nested_absmax.data_ptr() == state.state2.absmax.data_ptr()
        assert view.nested_code.data_ptr() == state.state2.code.data_ptr()
        assert view.offset.data_ptr() == state.offset.data_ptr()
    assert view.nested == nested
    assert view.shape == (40, 96)
    assert_same_weight(reference(dense, "nf4", 64, nested), view)
    assert_same_bits(dequantize_4bit(view), bnb.dequantize_4bit(weight4.data.view(-1, 1), _flat(state)).reshape(40, 96))


def _flat(state):
    """The state of a one-dimensional weight: bitsandbytes decodes that right whatever the length of a row."""
    import copy

    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return flat


def test_view_of_other_storage(bnb):
    """quant_storage=bfloat16 (as FSDP wants it) holds the same bytes; they are viewed, not copied."""
    w = weight((32, 64))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", quant_storage=torch.bfloat16)
    view = QuantWeight.from_bnb(packed, state)
    assert view.packed.data_ptr() == packed.data_ptr()
    assert_same_bits(view.packed.flatten(), reference(w, "nf4", 64).packed.flatten())


def test_view_of_a_repacked_weight(bnb):
    """An eval-mode forward leaves another layout behind on CPUs with AVX512-BF16: refused, not misread."""
    packed, state = bnb.quantize_4bit(weight((32, 64)), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="from_bnb: an eval-mode forward of bitsandbytes has repacked this weight"):
        QuantWeight.from_bnb(packed, state)


def test_view_of_a_weight_that_is_not_quantised_yet(bnb):
    import bitsandbytes

    with pytest.raises(ValueError, match="quant_state"):
        QuantWeight.from_bnb(bitsandbytes.nn.Linear4bit(64, 8).weight)


# ---- the format by itself ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_nearest(backend, dtype):
    """Against a search that knows nothing of midpoints: no code lies further from w / absmax than rounding explains."""
    w = weight((64, 64), dtype)
    for quant_type in ("nf4", "fp4"):
        qw = quantize_4bit(w, quant_type, 64)
        codes = torch.stack((qw.packed.flatten() >> 4, qw.packed.flatten() & 15), 1).reshape(-1, 64).long()
        values = table({"nf4": 1, "fp4": 2}[quant_type]).double()
        assert_same_bits(qw.absmax, w.float().abs().amax(1))
        scaled = w.double() / qw.absmax.double().unsqueeze(1)
        chosen = (values[codes] - scaled).abs()
        best = (values - scaled.unsqueeze(-1)).abs().amin(-1)
        assert bool((chosen - best <= 4 * torch.finfo(torch.float32).eps).all())


def test_high_nibble_is_the_even_element(backend):
    w = torch.zeros(64)
    w[0], w[1] = 1.0, -1.0
    qw = quantize_4bit(w, "nf4", 64)
    assert int(qw.packed[0]) == 0xF0
    assert qw.packed.shape == (32, 1)


def test_ties_go_down_and_zero_has_two_codes(backend):
    tie = (NF4_TABLE[7] + torch.tensor(NF4_TABLE[8], dtype=torch.float32).item()) / 2
    w = torch.zeros(64)
    w[0], w[1] = 1.0, tie
    assert int(quantize_4bit(w, "nf4", 64).packed[0]) == 0xF7
    w[1], w[2], w[3] = 1e-3, -1e-3, -0.0
    packed = quantize_4bit(w, "fp4", 64).packed.flatten()
    assert [int(b) for b in packed[:2]] == [0x38, 0x00]


def test_zero_blocks(backend):
    w = torch.zeros(64 + 7)
    qw = quantize_4bit(w, "nf4", 64)
    assert_same_bits(qw.absmax, torch.tensor([0.0, 1e-38]))
    assert_same_bits(dequantize_4bit(qw), w)
    nested = quantize_4bit(torch.zeros(64 * 3), "nf4", 64, nested=True)
    assert_same_bits(dequantize_4bit(nested).abs(), torch.zeros(64 * 3))


def test_non_finite_policy(backend):
    """A NaN takes its whole block with it and no other; an infinity decodes to infinity among NaNs."""
    w = weight((256,))
    clean = dequantize_4bit(quantize_4bit(w, "nf4", 64))
    w[70] = float("nan")
    w[130] = -float("inf")
    got = dequantize_4bit(quantize_4bit(w, "nf4", 64))
    assert bool(got[64:128].isnan().all())
    assert float(got[130]) == float("inf")
    assert int(got[128:192].isnan().sum()) == 63
    assert_same_bits(torch.cat((got[:64], got[192:])), torch.cat((clean[:64], clean[192:])))
    assert bool(dequantize_4bit(quantize_4bit(w, "nf4", 64, nested=True)).isnan().all())


def test_empty(backend):
    for nested in (False, True):
        qw = quantize_4bit(torch.zeros(0, 64), "nf4", 64, nested)
        assert qw.packed.numel() == qw.absmax.numel() == 0
        assert dequantize_4bit(qw).shape == (0, 64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_non_contiguous(backend, dtype):
    w = weight((96, 128), dtype).t()[::2, 1::3]
    assert not w.is_contiguous()
    assert_same_weight(quantize_4bit(w, "nf4", 32), reference(w.contiguous(), "nf4", 32))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decode_is_exact(backend, quant_type, nested):
    """Every code and scale: the float32 product, rounded once more for narrower outputs."""
    for shape, blocksize in (((64, 96), 64), ((33, 7), 32), ((1, 1), 4096), ((5, 4096), 256), ((3, 4097), 1024)):
        qw = random_quant_weight(*shape, quant_type=quant_type, blocksize=blocksize, nested=nested, seed=blocksize)
        scale = qw.absmax
        if nested:
            scale = qw.nested_code[qw.absmax.long()] * qw.nested_absmax.repeat_interleave(256)[: scale.numel()]
            scale = scale + qw.offset
        for dtype in FLOATS:
            got = dequantize_4bit(qw, dtype)
            assert got.shape == shape
            values = table({"nf4": 1, "fp4": 2}[quant_type])
            n = got.numel()
            bytes_ = qw.packed.flatten().long()
            codes = torch.stack((bytes_ >> 4, bytes_ & 15), 1).flatten()[:n]
            expected = (values[codes] * scale[torch.arange(n) // blocksize]).to(dtype).reshape(shape)
            assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_narrow_outputs(backend, dtype):
    """Scales over the whole range of float32: overflow, subnormals of both types, ties."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    for scale in (1.0, 1.0 + 2**-8, 1.0 + 2**-11, 1.5 + 2**-23):
        absmax = (torch.exp2(exponents) * scale).float()
        packed = torch.arange(256).to(torch.uint8).repeat(absmax.numel())[: absmax.numel() * 16]
        qw = QuantWeight(packed, absmax, (absmax.numel() * 32,), "nf4", 32)
        with use_backend("reference"):
            expected = dequantize_4bit(qw, torch.float32).to(dtype)
        assert_same_bits(dequantize_4bit(qw, dtype), expected)


def test_dequantised_weight_quantises_to_itself(backend):
    """With plain scales the round trip is a projection: quantising what was decoded changes nothing."""
    once = dequantize_4bit(quantize_4bit(weight((64, 96)), "nf4", 64))
    assert_same_bits(dequantize_4bit(quantize_4bit(once, "nf4", 64)), once)


def test_float64_goes_through_float32():
    w = weight((7, 33)).double() * (1 + 2**-40)
    qw = quantize_4bit(w, "nf4", 32)
    assert_same_bits(qw.packed, quantize_4bit(w.float(), "nf4", 32).packed)
    assert_same_bits(dequantize_4bit(qw), dequantize_4bit(qw, torch.float32).double())


@needs_native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 9000),
    blocksize=st.sampled_from(BLOCKSIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(FLOATS),
    out=st.sampled_from(FLOATS),
    nested=st.booleans(),
    nested_blocksize=st.sampled_from([32, 256]),
    seed=st.integers(0, 5),
)
def test_native_is_the_reference(n, blocksize, quant_type, dtype, out, nested, nested_blocksize, seed):
    w = weight((n,), dtype, seed)
    expected = reference(w, quant_type, blocksize, nested, nested_blocksize)
    with use_backend("native"):
        assert_same_weight(quantize_4bit(w, quant_type, blocksize, nested, nested_blocksize), expected)
        decoded = dequantize_4bit(expected, out)
    with use_backend("reference"):
        assert_same_bits(decoded, dequantize_4bit(expected, out), any_nan=True)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_threads_do_not_change_bits(level):
    """More elements than a task of one thread, and more than the streaming stores start at."""
    before, threads = native.level(), torch.get_num_threads()
    w = weight((1024, 65 * 128 + 1))
    try:
        native.set_level(level)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("native"):
                qw = quantize_4bit(w, "nf4", 64)
                results.append((qw, dequantize_4bit(qw)))
        for qw, dense in results[1:]:
            assert_same_weight(qw, results[0][0])
            assert_same_bits(dense, results[0][1])
        with use_backend("reference"):
            assert_same_bits(results[0][1], dequantize_4bit(results[0][0]))
    finally:
        torch.set_num_threads(threads)
        native.set_level(before)
