"""quantize_4bit and dequantize_4bit on Triton and CUDA: every byte is the reference's.

Triton's interpreter is chosen when Triton is imported, so in an ordinary run `test_in_the_interpreter` starts this file
in a process of its own; there Triton serves CPU tensors. Outside it the tests need a GPU and run on both backends.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from forms import combinations
from interpreter_tools import DEVICE, INTERPRETER, not_interpreted, on_device, run_in_the_interpreter
from torch import Tensor

from peft_kernels import BackendUnavailable, QuantWeight, dequantize_4bit, quantize_4bit, use_backend
from peft_kernels.formats import BLOCKSIZES
from peft_kernels.ops.dequantize_4bit import op as dequantize_op
from peft_kernels.ops.quantize_4bit import op as quantize_op
from peft_kernels.testing import assert_same_bits, random_quant_weight
from peft_kernels.triton_lib import host

OPCHECKS = ("test_schema", "test_faketensor")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# the interpreter computes with numpy, which warns of 0 / 0
backends = pytest.mark.parametrize("backend", ["triton"] if INTERPRETER else ["triton", "cuda"])


@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_in_the_interpreter(__file__, "not outside and not in_the_interpreter")


def weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values with scales over decades, exact zeros, and where there is room a NaN, an infinity, a zero block."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * torch.exp(2 * torch.randn(shape, generator=g)).clamp(max=100)
    w = torch.where(torch.rand(shape, generator=g) < 0.05, 0.0, w).to(dtype)
    flat = w.view(-1)
    if flat.numel() > 2000:
        flat[70], flat[300], flat[-1] = float("nan"), float("inf"), -float("inf")
        flat[512:1024] = 0
        flat[1024:1536] *= 1e-38
    return w


def to_host(qw: QuantWeight) -> list[Tensor | int]:
    return [t.cpu() if isinstance(t, Tensor) else t for t in qw.flatten() if t is not None]


def check_quantise(backend: str, w: Tensor, quant_type: str, blocksize: int, nested: bool, inner: int = 256) -> None:
    with use_backend("reference"):
        # nested: torch's mean on the device is part of the result, so the reference runs there too
        expected = quantize_4bit(w, quant_type, blocksize, nested, inner)
    with use_backend(backend):
        got = quantize_4bit(w, quant_type, blocksize, nested, inner)
    assert got.packed.device == w.device
    for a, b in zip(to_host(got), to_host(expected), strict=True):
        if isinstance(a, Tensor):
            assert_same_bits(a, b, any_nan=a.is_floating_point())
        else:
            assert a == b


@on_device
@backends
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantise_is_the_reference(backend, quant_type, dtype):
    shapes = [(0,), (1,), (7,), (65,), (33, 77), (40, 128)]
    cases = [(64, shape) for shape in shapes] + list(itertools.product(BLOCKSIZES, [(33, 77), (2, 4096)]))
    for (blocksize, shape), nested in combinations(cases, (False, True)):
        check_quantise(backend, weight(shape, dtype, blocksize).to(DEVICE), quant_type, blocksize, nested)


@on_device
@backends
def test_nested_blocks(backend):
    """More scales than one nested block holds, and another nested blocksize."""
    w = torch.randn(64 * 700 + 5)
    for inner in (256, 32, 1024):
        check_quantise(backend, w.to(DEVICE), "nf4", 64, True, inner)


@on_device
@backends
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantise_is_the_reference(backend, quant_type, nested):
    cases = [((1, 1), 64), ((7, 9), 32), ((33, 77), 64), ((20, 4096), 64), ((0, 8), 64)]
    cases += [((3, 4097), 1024), ((5, 4096), 4096)]
    for (shape, blocksize), dtype in combinations(cases, FLOATS):
        qw = random_quant_weight(*shape, quant_type=quant_type, blocksize=blocksize, nested=nested)
        with use_backend("reference"):
            expected = dequantize_4bit(qw, dtype)
        with use_backend(backend):
            got = dequantize_4bit(qw.to(DEVICE), dtype)
        assert_same_bits(got.cpu(), expected)


@on_device
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_narrow_outputs(backend, dtype):
    """Scales over the whole range of float32: overflow, subnormals of both types, ties."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    absmax = torch.cat([torch.exp2(exponents) * f for f in (1.0, 1.0 + 2**-8, 1.5 + 2**-23)]).float()
    packed = torch.arange(256).to(torch.uint8).repeat(absmax.numel())[: absmax.numel() * 16]
    qw = QuantWeight(packed, absmax, (absmax.numel() * 32,), "nf4", 32)
    with use_backend("reference"):
        expected = dequantize_4bit(qw, torch.float32).to(dtype)
    with use_backend(backend):
        assert_same_bits(dequantize_4bit(qw.to(DEVICE), dtype).cpu(), expected)


@on_device
@backends
@pytest.mark.parametrize("offset", [1, 3])
def test_storage_that_starts_anywhere(backend, offset):
    """Views into larger buffers: neither the weight nor the packed bytes are aligned to a vector."""
    w = torch.randn(5000 + offset, dtype=torch.bfloat16)[offset:].to(DEVICE)
    shifted = torch.empty(w.numel() + offset, dtype=w.dtype, device=DEVICE)[offset:].copy_(w)
    check_quantise(backend, shifted, "nf4", 64, False)
    qw = random_quant_weight(4, 1001)
    packed = torch.empty(qw.packed.numel() + offset, dtype=torch.uint8, device=DEVICE)[offset:].copy_(qw.packed)
    with use_backend("reference"):
        expected = dequantize_4bit(qw)
    with use_backend(backend):
        got = dequantize_4bit(QuantWeight(packed, qw.absmax.to(DEVICE), (4, 1001)))
    assert_same_bits(got.cpu(), expected)


@on_device
@backends
def test_opcheck(backend):
    w = torch.randn(33, 7).to(DEVICE)
    with use_backend(backend):
        for nested in (False, True):
            torch.library.opcheck(
                quantize_op.op, (w, 1, 32, nested, 256), test_utils=("test_schema", "test_faketensor")
            )
            qw = quantize_4bit(w, "nf4", 32, nested)
            args = (*qw.flatten(), [33, 7], torch.float32)
            torch.library.opcheck(dequantize_op.op, args, test_utils=OPCHECKS)


@not_interpreted
def test_cpu_tensors_are_refused_outside_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    with use_backend("triton"), pytest.raises(BackendUnavailable, match=r"quantize_4bit: .*TRITON_INTERPRET=1"):
        quantize_4bit(torch.zeros(64))


def test_cuda_refuses_cpu_tensors_outside_a_gpu():
    refusal = r"dequantize_4bit: .*serves CPU tensors by a host build"
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match=refusal):
        dequantize_4bit(random_quant_weight(4, 64))


# ---- machine code, without a GPU -------------------------------------------------------------------------------------
@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
def test_cubins_outside_the_interpreter(capability):
    """Every kernel compiles; exactness shows in the PTX: no fused multiply-add, no approximate division, no flush to
    zero; and the memory traffic is in whole vectors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from peft_kernels.ops.dequantize_4bit import triton as dequantize
    from peft_kernels.ops.quantize_4bit import triton as quantize

    with host.compile_only(capability) as compiled:
        for dtype, quant_type, blocksize in ((torch.bfloat16, 1, 64), (torch.float32, 2, 4096), (torch.float16, 1, 32)):
            quantize.quantize_4bit(torch.zeros(4096, 64, dtype=dtype), quant_type, blocksize, True, 256)
            for nested in (False, True):
                qw = random_quant_weight(64, 4096, blocksize=blocksize, nested=nested)
                dequantize.dequantize_4bit(*qw.flatten(), [64, 4096], dtype)
    names = [c.name for c in compiled]
    assert {n: names.count(n) for n in set(names)} == {"quantize_kernel": 3, "absmax_kernel": 3, "dequantize_kernel": 6}
    for c in compiled:
        assert c.kernel.asm["cubin"][:4] == b"\x7fELF"
        ptx = c.kernel.asm["ptx"]
        assert f".target sm_{capability}" in ptx
        for bad in ("fma.rn", "div.full", "div.approx", "rcp.approx", ".ftz"):
            assert bad not in ptx, f"{c.name}: {bad}"
        if c.name != "dequantize_kernel":
            assert "div.rn.f32" in ptx
        wide = {"quantize_kernel": "ld.global.v4", "dequantize_kernel": "st.global.v4"}.get(c.name, "")
        assert wide in ptx, f"{c.name}: no {wide}"
