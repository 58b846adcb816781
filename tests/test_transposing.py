"""Many matrices transposed in one call: the bits of `copy_`, by the native library and without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import native
from peft_kernels.testing import assert_same_bits
from peft_kernels.transposing import copy_transposed

needs_native = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
SHAPES = [(576, 16), (16, 1536), (1, 1), (1, 300), (300, 1), (17, 33), (0, 5), (5, 0), (257, 513)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each native call had."""
    found: list[int] = []
    run = native.cpu().pk_cpu_transpose

    class Library:
        def pk_cpu_transpose(self, packed: bytes, count: int, size: int, threads: int) -> int:
            found.append(count)
            code: int = run(packed, count, size, threads)
            return code

    monkeypatch.setattr(native, "cpu", Library)
    return found


def sources(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_copy(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, found, before = sources(dtype), calls(monkeypatch), torch.get_num_threads()
    outs = [t.new_empty((t.shape[1], t.shape[0])) for t in given]
    try:
        torch.set_num_threads(threads)
        copy_transposed(list(zip(outs, given, strict=True)))
    finally:
        torch.set_num_threads(before)
    for out, t in zip(outs, given, strict=True):
        assert_same_bits(out, t.t().contiguous())
    assert found == ([] if dtype is torch.float64 else [len(given)])


@needs_native
@pytest.mark.parametrize("way", ["parts", "columns", "backwards", "two dtypes", "expanded"])
def test_parts_of_larger_tensors(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns of a stack are written in place, and nothing beside them; other strides go through torch."""
    found, source = calls(monkeypatch), torch.randn(40, 24)
    stack, want = torch.zeros(60, 90), torch.zeros(60, 90)
    if way == "backwards":
        source = torch.randn(24, 40).t()
    elif way == "expanded":
        source = torch.randn(1, 24).expand(40, 24)
    elif way == "two dtypes":
        source = source.bfloat16()
    elif way == "columns":
        source = torch.randn(40, 70)[:, 3:27]
    own = (slice(20, 44), slice(7, 47))
    want[own] = source.t().float()
    copy_transposed([(stack[own], source)])
    assert_same_bits(stack, want)
    assert found == ([1] if way in ("parts", "columns") else [])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda library="cpu": "not built")
    given = [t.requires_grad_() for t in sources(torch.float32)]
    outs = [t.new_empty((t.shape[1], t.shape[0])) for t in given]
    copy_transposed(list(zip(outs, given, strict=True)))
    for out, t in zip(outs, given, strict=True):
        assert_same_bits(out, t.detach().t().contiguous())
        assert not out.requires_grad


def test_shapes_that_do_not_fit_and_nothing_at_all() -> None:
    copy_transposed([])
    with pytest.raises(RuntimeError):
        copy_transposed([(torch.empty(3, 4), torch.empty(3, 4))])


@needs_native
def test_the_library_refuses_rows_that_overlap() -> None:
    import struct

    x = torch.zeros(16)
    packed = struct.pack("=6q", x.data_ptr(), x.data_ptr(), 2, 4, 3, 2)
    with pytest.raises(native.NativeError, match="must not overlap"):
        native.check(native.cpu().pk_cpu_transpose(packed, 1, 4, 1))
    with pytest.raises(native.NativeError, match="2 or 4 bytes"):
        native.check(native.cpu().pk_cpu_transpose(packed, 1, 8, 1))
