"""Launches at the ends of what a GPU takes: offsets beyond 32 bits, grids, storage that is not aligned."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from forms import by_form

from peft_kernels import dispatch, native, samples
from peft_kernels.dispatch import Backend
from peft_kernels.ops.dora_norm import triton as norms
from peft_kernels.ops.lora_linear import triton as lora
from peft_kernels.triton_lib import host

pytest.importorskip("triton")
OPS = dispatch.ops()
BF16 = torch.bfloat16


def compiled(run: Any) -> list[host.Compiled]:
    if host.interpreting():
        pytest.skip("Triton interprets in this process")
    with host.compile_only(90) as found:
        run()
    return found


@pytest.mark.parametrize("what", by_form(short=["forward"], full_form=["forward", "backward", "norm"]))
def test_a_transposed_dense_weight_is_read_by_64_bit_offsets(what: str) -> None:
    """W of 2^31 elements or more: the offset of its last column is k * stride_k, beyond 32 bits."""
    w = torch.empty(256, 128, dtype=BF16, device="meta").t()  # [N, K] at strides (1, N)
    x, dy = torch.empty(16, 256, dtype=BF16, device="meta"), torch.empty(16, 128, dtype=BF16, device="meta")
    flat = (w, None, None, None, None, 0, 64, 256)
    runs = {
        "forward": lambda: lora.forward(x, *flat, 128, None, None, 1.0, None, 0.0, None),
        "backward": lambda: lora.backward(dy, x, *flat, None, None, None, 1.0, 0.0, None, True, False),
        "norm": lambda: norms.squared_row_norms(*flat, 128, 256),
    }
    (kernel,) = [c for c in compiled(runs[what]) if "reduce" not in c.name]
    text = kernel.kernel.asm["ttir"]
    assert re.search(r"arith\.extsi %stride_k\w* : i32 to i64", text), "it is widened"
    assert not re.search(r"tt\.splat %stride_k\w* : i32", text), "it is multiplied by 32-bit columns"


def test_attention_of_many_heads_and_rows_fits_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(host, "launch", lambda kernel, grid, *args, **options: grids.append(grid))
    for name in ("attention", "attention_backward"):
        op = OPS[name]
        backend, args = op.load("triton"), op.sample(BF16)
        assert isinstance(backend, Backend)
        tensors = {n for n, d in samples.parse(op.sizes) if "Z" in d}

        def wide(batch: int) -> list[Any]:
            there = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in args]  # noqa: B023
            return [v.expand(batch, *v.shape[1:]) if n in tensors and v is not None else v  # noqa: B023
                    for n, v in zip(op.operands.names, there, strict=True)]  # fmt: skip  # noqa: B023

        backend.fn(*wide(40_000))
        reason = backend.when
        assert reason is not None
        assert "65535" in str(reason(*wide(65_536)))
        assert "65535" not in str(reason(*wide(65_535)))
    assert len(grids) == 3
    assert all(max(grid[1:]) <= host.MOST_BLOCKS for grid in grids), grids


def test_attention_whose_result_is_wider_than_its_operands() -> None:
    """y's heads are those of q and as wide as v's: 2^31 elements of a row, where q has 2^27 and v 2^25."""
    backend = OPS["attention"].load("triton")
    assert isinstance(backend, Backend)
    for tokens, reason in ((2**17, r"2\^31 elements"), (2**16, None)):
        q = torch.empty(1, tokens, 64, 16, device="meta")
        k, v = (torch.empty(1, tokens, 1, n, device="meta") for n in (16, 256))
        found = backend.when(q, k, v)
        assert (found is None or "2^31" not in found) if reason is None else re.search(reason, str(found))


def test_a_grid_that_no_gpu_takes_is_named() -> None:
    def kernel() -> None: ...

    with pytest.raises(ValueError, match=r"kernel: the grid must have up to 65535 blocks .* got \(1, 65536\)"):
        host.launch(kernel, (1, 65536), num_warps=4, num_stages=1)


def test_more_adapters_than_a_grid_has_are_refused() -> None:
    for name in ("multi_lora_linear", "multi_lora_linear_backward"):
        op = OPS[name]
        backend, args, names = op.load("triton"), op.sample(BF16), op.operands.names
        assert isinstance(backend, Backend)
        assert backend.when is not None
        for count, refused in ((65_534, True), (65_533, False)):
            many = [*args]
            for key in ("x", "dy"):
                if key in names:
                    many[names.index(key)] = torch.empty(70_000, 1, device="meta")
            for key in ("starts", "ranks"):
                many[names.index(key)] = torch.empty(count, dtype=torch.int64, device="meta")
            assert ("adapters in as many rows" in str(backend.when(*many))) == refused, name


def test_storage_that_is_not_aligned_is_said() -> None:
    t = torch.zeros(4096, dtype=BF16)
    whole, part = t[: 16 * 128].view(16, 128), t[1 : 1 + 16 * 128].view(16, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.say_misaligned(x=whole, weight=whole)
        lora._Weight(whole, None, None, None, None, 0, 64, 256, 16, 128, BF16)
    with pytest.warns(UserWarning, match=r"weight does not begin at a multiple of 16 bytes .* pass weight.clone\(\)"):
        lora._Weight(part, None, None, None, None, 0, 64, 256, 16, 128, BF16)
