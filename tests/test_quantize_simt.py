"""The CUDA sources of quantize_4bit and dequantize_4bit, run on the host (csrc/simt) through their cuda.py backends.

What this shows: the index arithmetic, the barriers, the order of operations and the wrappers. What it cannot show: what
nvcc makes of them; on a GPU test_quantize_device.py does.
"""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, explain, native, quantize_4bit, use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.formats import BLOCKSIZES
from peft_kernels.ops.dequantize_4bit import cuda
from peft_kernels.testing import assert_same_bits, random_quant_weight

tools = runpy.run_path(str(Path(__file__).with_name("simt_tools.py")))
simt, races, seed = tools["simt"], tools["races"], tools["seed"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_quantise(w: Tensor, quant_type: str, blocksize: int, nested: bool, inner: int = 256) -> None:
    with use_backend("reference"):
        expected = quantize_4bit(w, quant_type, blocksize, nested, inner)
    with use_backend("cuda"):
        got = quantize_4bit(w, quant_type, blocksize, nested, inner)
    for name in ("packed", "absmax", "nested_absmax", "nested_code", "offset"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if b is not None:
            assert_same_bits(a, b, any_nan=b.is_floating_point())


def check_dequantise(qw: QuantWeight, dtype: torch.dtype) -> None:
    with use_backend("reference"):
        expected = dequantize_4bit(qw, dtype)
    with use_backend("cuda"):
        assert_same_bits(dequantize_4bit(qw, dtype), expected)


def weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Scales over decades; where there is room a NaN, infinities, a block of zeros and one of subnormals."""
    w = (torch.randn(shape) * torch.exp(2 * torch.randn(shape)).clamp(max=100)).to(dtype)
    flat = w.view(-1)
    if flat.numel() > 2000:
        flat[70], flat[300], flat[-1] = float("nan"), float("inf"), -float("inf")
        flat[512:1024] = 0
        flat[1024:1536] *= 1e-38
    return w


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantise_is_the_reference(simt, quant_type, dtype):
    cases = [(64, (n,)) for n in (0, 1, 7, 63, 64, 65, 100)]
    cases += itertools.product(BLOCKSIZES, [(33, 77), (2, 4096)])
    for (blocksize, shape), nested in itertools.product(cases, (False, True)):
        check_quantise(weight(shape, dtype), quant_type, blocksize, nested)


def test_nested_blocks(simt):
    w = torch.randn(64 * 700 + 5)
    for inner in (256, 32, 1024):
        check_quantise(w, "nf4", 64, True, inner)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantise_is_the_reference(simt, quant_type, nested):
    cases = [((1, 1), 64), ((7, 9), 32), ((33, 77), 64), ((20, 4096), 64), ((0, 8), 64), ((3, 4097), 1024)]
    for (shape, blocksize), dtype in itertools.product(cases, FLOATS):
        check_dequantise(random_quant_weight(*shape, quant_type=quant_type, blocksize=blocksize, nested=nested), dtype)


@pytest.mark.parametrize(("columns", "blocksize", "nested", "apart"), [
    (192, 64, False, 1), (96, 64, False, 2), (192, 64, True, 256), (4096, 64, True, 4), (40, 32, False, 4),
    (77, 64, False, 64), (128, 4096, False, 32),
])  # fmt: skip
def test_rows_of_a_weight_are_decoded_alone(simt, columns, blocksize, nested, apart):
    """From where a block of every kind of scales begins."""
    qw = random_quant_weight(2 * apart + 3, columns, quant_type="fp4", blocksize=blocksize, nested=nested)
    parts = qw.flatten()
    assert cuda.rows_apart(columns, parts) == apart
    with use_backend("reference"):
        expected = dequantize_4bit(qw, torch.bfloat16).view(-1, columns)
    memory = torch.full((3 * columns + 5,), 7.0, dtype=torch.bfloat16)
    for first in (0, apart, 2 * apart):
        rows = range(first, first + min(apart, 3))
        got = cuda.decode_rows(rows, columns, memory, parts)
        assert_same_bits(got, expected[rows.start : rows.stop])
        assert got.data_ptr() == memory.data_ptr()
    assert (memory[3 * columns :] == 7).all()


@pytest.mark.parametrize("offset", [1, 3])
def test_storage_that_starts_anywhere(simt, offset):
    check_quantise(torch.randn(5000 + offset, dtype=torch.bfloat16)[offset:], "nf4", 64, False)
    qw = random_quant_weight(4, 1001)
    packed = torch.empty(qw.packed.numel() + offset, dtype=torch.uint8)[offset:].copy_(qw.packed)
    check_dequantise(QuantWeight(packed, qw.absmax, (4, 1001)), torch.float32)


def test_no_races_in_any_order(races, seed):
    races.pk_simt_set_seed(seed)
    for blocksize, shape in itertools.product((32, 64, 4096), [(3, 77), (2, 1024)]):
        check_quantise(weight(shape, torch.bfloat16), "nf4", blocksize, True, 32)
        check_dequantise(random_quant_weight(*shape, blocksize=blocksize, nested=True), torch.bfloat16)


def test_errors_come_through(simt):
    code = simt.pk_cuda_quantize_4bit(1, 0, 64, 64, 1, 1, 1, 1, 7, None)
    with pytest.raises(native.NativeError, match=r"quantize_4bit: .*\(cudaErrorNoDevice\)"):
        native.check(code, "cuda")


def test_only_where_a_host_build_is_loaded():
    w = torch.randn(64)
    with use_backend("cuda"):
        with pytest.raises(BackendUnavailable, match=r"host build of the CUDA sources .*use_simt.* none is loaded"):
            quantize_4bit(w)
        args = (w, 1, 64, False, 256)
        assert "none is loaded" in explain("quantize_4bit", *args)["cuda"]
        with tools["loaded"]("plain"):
            assert explain("quantize_4bit", *args)["cuda"] == "chosen"
    with tools["loaded"]("plain"):  # unasked the CPU keeps its own kernels
        assert explain("quantize_4bit", *args)["cuda"] == "does not serve cpu tensors unless forced"
    with pytest.raises(native.NativeError, match="path must be a host build of the CUDA sources, got nowhere"):
        native.use_simt("nowhere")


@pytest.mark.slow
def test_nothing_out_of_bounds():
    tools["under_asan"](__file__, "-k", "nf4-dtype1 or nf4-True or storage")
