"""quantize_4bit and dequantize_4bit as torch sees them: opcheck, compiled graphs, gradients, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, native, quantize_4bit, use_backend
from peft_kernels.ops.dequantize_4bit import op as dequantize_op
from peft_kernels.ops.quantize_4bit import op as quantize_op
from peft_kernels.testing import assert_same_bits

needs_native = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def reference(w: Tensor, nested: bool, blocksize: int = 64) -> QuantWeight:
    with use_backend("reference"):
        return quantize_4bit(w, "nf4", blocksize, nested)


def test_opcheck(backend):
    for nested in (False, True):
        w = weight((33, 7))
        torch.library.opcheck(quantize_op.op, (w, 1, 32, nested, 256))
        qw = reference(w, nested, 32)
        torch.library.opcheck(dequantize_op.op, (*qw.flatten(), [33, 7], torch.bfloat16))


def test_compiled_is_eager(backend):
    """One graph, no break, the same bits; the choice of backend is not frozen into it."""
    qw = reference(weight((24, 64)), True)

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, dequantize_4bit(qw))

    x = weight((3, 64))
    torch._dynamo.reset()
    assert_same_bits(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x))


def test_inputs_that_need_gradients():
    w = torch.nn.Parameter(weight((8, 64)))
    qw = quantize_4bit(w)  # the public function detaches
    assert not qw.packed.requires_grad
    with pytest.raises(RuntimeError, match="quantize_4bit: the raw operator records no gradients"):
        quantize_op.op(w, 1, 64, False, 256)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((torch.zeros(64, dtype=torch.int32),), TypeError, "w must be a floating-point tensor, got torch.int32"),
        ((torch.zeros(64), "int4"), ValueError, r"quant_type must be one of \['fp4', 'nf4'\], got 'int4'"),
        ((torch.zeros(64), "nf4", 48), ValueError, r"blocksize must be one of \(32, .*\), got 48"),
        ((torch.zeros(64), "nf4", 64, True, 7), ValueError, "nested_blocksize must be one of .*, got 7"),
    ],
)
def test_quantize_errors(args, error, text):
    with pytest.raises(error, match=f"quantize_4bit: {text}"):
        quantize_4bit(*args)


def test_dequantize_errors():
    qw = reference(weight((4, 64)), True)
    good = [*qw.flatten(), [4, 64], torch.float32]

    def fails(text: str, error: type[Exception], **changes: object) -> None:
        names = ["packed", "absmax", "nested_absmax", "nested_code", "offset", "quant_type", "blocksize",
                 "nested_blocksize", "shape", "dtype"]  # fmt: skip
        args = [changes.get(name, value) for name, value in zip(names, good, strict=True)]
        with pytest.raises(error, match=f"dequantize_4bit: {text}"):
            dequantize_op.op(*args)

    fails("packed must be uint8, got torch.float32", TypeError, packed=qw.packed.float())
    fails("packed must be 126 bytes for shape .4, 63., got 128", ValueError, shape=[4, 63])
    fails("absmax must be 4 scales .* got 3", ValueError, absmax=qw.absmax[:3])
    fails("absmax must be uint8 codes when nested, got torch.float32", TypeError, absmax=qw.absmax.float())
    fails("absmax must be float32 when it is not nested", TypeError, nested_absmax=None)
    fails("nested_code must be 256 float32 values, got None", ValueError, nested_code=None)
    fails("nested_code must be 256 float32 values, got 16", ValueError, nested_code=qw.nested_code[:16])
    fails("offset must be float32, got torch.float64", TypeError, offset=qw.offset.double())
    fails("quant_type must be one of .* got 0", ValueError, quant_type=0)
    fails("blocksize must be one of .* got 100", ValueError, blocksize=100)
    fails("dtype must be a floating-point dtype, got torch.int8", TypeError, dtype=torch.int8)
    fails("nested_absmax must be on cpu like packed, got meta", ValueError, nested_absmax=qw.nested_absmax.to("meta"))
