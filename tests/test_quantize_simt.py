"""The CUDA sources of quantize_4bit and dequantize_4bit, run on the host (csrc/simt) through their cuda.py backends.

What this shows: the index arithmetic, the barriers, the order of operations and the wrappers. What it cannot show: what
nvcc makes of them; on a GPU test_quantize_device.py does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, native, quantize_4bit, use_backend
from peft_kernels.formats import BLOCKSIZES, QUANT_TYPES
from peft_kernels.ops.dequantize_4bit import cuda as dequantize
from peft_kernels.ops.quantize_4bit import cuda as quantize
from peft_kernels.testing import assert_same_bits, random_quant_weight

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CDLL:
    command = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not command:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("simt") / "libpeft_kernels_simt.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-DPK_SIMT", "-Wall", "-Wextra", "-Werror"]
    files = sorted(str(p) for p in SOURCES.glob("*.cu"))
    done = subprocess.run(
        # the library by name: CXX may be gcc, which does not link it by itself
        [*command, *flags, "-Wno-unknown-pragmas", "-x", "c++", *files, "-lstdc++", "-o", str(out)],
        capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return CDLL(str(out))


@pytest.fixture(autouse=True)
def stand_in(library: CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cuda.py backends on CPU tensors, with the host build as the CUDA library."""
    assert native._bind(library, native._CUDA_SIGNATURES) is None
    monkeypatch.setitem(native._loaded, "cuda", library)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for module in (quantize, dequantize):
        monkeypatch.setattr(module, "device_index", lambda _: 0)
        monkeypatch.setattr(module, "stream", lambda _: None)
    with use_backend("reference"):
        yield


def check_quantise(w: Tensor, quant_type: str, blocksize: int, nested: bool, inner: int = 256) -> None:
    expected = quantize_4bit(w, quant_type, blocksize, nested, inner)
    got = quantize.quantize_4bit(w, QUANT_TYPES[quant_type], blocksize, nested, inner)
    parts = (expected.nested_absmax, expected.nested_code, expected.offset) if nested else ()
    for a, b in zip(got, (expected.packed, expected.absmax, *parts), strict=False):
        assert_same_bits(a, b, any_nan=b.is_floating_point())


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
def test_quantise_is_the_reference(quant_type, dtype):
    cases = [(64, (n,)) for n in (0, 1, 7, 63, 64, 65, 100)]
    cases += itertools.product(BLOCKSIZES, [(33, 77), (2, 4096)])
    for (blocksize, shape), nested in itertools.product(cases, (False, True)):
        check_quantise(weight(shape, dtype), quant_type, blocksize, nested)


def test_nested_blocks():
    w = torch.randn(64 * 700 + 5)
    for inner in (256, 32, 1024):
        check_quantise(w, "nf4", 64, True, inner)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantise_is_the_reference(quant_type, nested):
    cases = [((1, 1), 64), ((7, 9), 32), ((33, 77), 64), ((20, 4096), 64), ((0, 8), 64), ((3, 4097), 1024)]
    for (shape, blocksize), dtype in itertools.product(cases, FLOATS):
        qw = random_quant_weight(*shape, quant_type=quant_type, blocksize=blocksize, nested=nested)
        got = dequantize.dequantize_4bit(*qw.flatten(), list(shape), dtype)
        assert_same_bits(got, dequantize_4bit(qw, dtype))


@pytest.mark.parametrize("offset", [1, 3])
def test_storage_that_starts_anywhere(offset):
    check_quantise(torch.randn(5000 + offset, dtype=torch.bfloat16)[offset:], "nf4", 64, False)
    qw = random_quant_weight(4, 1001)
    packed = torch.empty(qw.packed.numel() + offset, dtype=torch.uint8)[offset:].copy_(qw.packed)
    shifted = QuantWeight(packed, qw.absmax, (4, 1001))
    assert_same_bits(
        dequantize.dequantize_4bit(*shifted.flatten(), [4, 1001], torch.float32), dequantize_4bit(qw)
    )  # fmt: skip


def test_errors_come_through(library):
    code = library.pk_cuda_quantize_4bit(1, 0, 64, 64, 1, 1, 1, 1, 7, None)
    with pytest.raises(native.NativeError, match=r"quantize_4bit: .*\(cudaErrorNoDevice\)"):
        native.check(code, "cuda")
