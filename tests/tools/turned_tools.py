"""Calls of butterfly_linear, forward and backward, held against float64; for several test files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rotation_tools import make_blocks
from torch import Tensor

from peft_kernels.formats import QuantWeight
from peft_kernels.ops import butterfly_linear as op
from peft_kernels.ops.lora_linear import dense_weight, flat_weight
from peft_kernels.testing import assert_no_worse, random_quant_weight


@dataclass(frozen=True)
class Turned:
    """A call: M rows, K -> N features, m factors of blocks of b. weight: "dense", or a blocksize of NF4 codes."""

    M: int
    N: int
    K: int
    m: int
    b: int
    weight: str | int = "dense"
    shared: bool = False
    bias: bool = True
    gain: bool = False
    blocks: torch.dtype = torch.float32


CASES = (
    Turned(5, 7, 12, 1, 4), Turned(1, 16, 64, 1, 32, 64, gain=True), Turned(3, 96, 128, 3, 4, gain=True),
    Turned(130, 48, 192, 1, 32, 64), Turned(9, 40, 96, 2, 6, 32, gain=True, shared=True), Turned(33, 5, 9, 1, 3, 64),
    Turned(70, 24, 40, 1, 4, gain=True, bias=False, blocks=torch.bfloat16), Turned(4, 8, 256, 1, 256, 64, bias=False),
    Turned(0, 8, 16, 1, 4), Turned(6, 100, 320, 4, 10, 64, shared=True),
)  # fmt: skip
LONG = Turned(1300, 20, 64, 2, 4, 64, gain=True)  # more rows than are turned at once, in two parts backward


def check_turned(case: Turned, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Forward and backward on the backend in force; what it returned."""
    c = case

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float64)

    x, dy = draw(c.M, c.K).to(dtype), draw(c.M, c.N).to(dtype)
    weight: Tensor | QuantWeight = (
        draw(c.N, c.K).to(dtype)
        if isinstance(c.weight, str)
        else random_quant_weight(c.N, c.K, blocksize=c.weight, nested=c.weight == 64).to(device)
    )
    flat = flat_weight("test", weight)[0]
    blocks = make_blocks(c.m, 1 if c.shared else c.K // c.b, c.b, c.blocks, device)
    gain, bias = (draw(c.N).float() if c.gain else None), (draw(c.N).float() if c.bias else None)
    # what the exact call computes with: the weight as eager code has it in dtype, all in float64
    dense = dense_weight(*flat, c.N, c.K, dtype).double()
    exact_flat: tuple[Any, ...] = (dense, None, None, None, None, 0, 64, 256)

    def double(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.double() for t in tensors]

    def absolute(tensors: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else t.abs() for t in tensors]

    exact = double(x, blocks, gain, bias, dy)
    large, large_flat = absolute(exact), (dense.abs(), *exact_flat[1:])
    forward = (x, blocks, *flat, c.N, gain, bias, c.gain)
    y, h = op.forward_op.op(*forward)
    eager = op.forward_op.reference(*forward)
    wanted = op.forward_op.reference(*exact[:2], *exact_flat, c.N, *exact[2:4], c.gain)
    sizes = op.forward_op.reference(*large[:2], *large_flat, c.N, *large[2:4], c.gain)
    # a turned x in 16 bits rounds as its own terms do, which the absolute values through both products bound
    for found in zip((y, h), eager, wanted, sizes, strict=True):
        assert_no_worse(*found)
    assert h.numel() == (y.numel() if c.gain else 0)

    kept = h if c.gain else None
    back = (dy, x, blocks, *flat, gain, kept)
    needs = (True, True, c.gain)
    got = op.backward_op.op(*back, *needs)
    eager_back = op.backward_op.reference(*back, *needs)
    exact_h, large_h = double(kept)[0], absolute(double(kept))[0]
    wanted_back = op.backward_op.reference(exact[4], *exact[:2], *exact_flat, exact[2], exact_h, *needs)
    large_back = op.backward_op.reference(large[4], *large[:2], *large_flat, large[2], large_h, *needs)
    # dy W is rounded to dtype before it is turned back: the blocks' gradient, in another dtype, has dtype's digits
    got, eager_back = ((dx, dblocks.to(dtype), dgain) for dx, dblocks, dgain in (got, eager_back))
    for found in zip(got, eager_back, wanted_back, large_back, strict=True):
        assert_no_worse(*found)
    for index in range(3):  # one gradient alone
        alone = [index == i for i in range(3)]
        if index == 2 and not c.gain:
            continue
        only = op.backward_op.op(*back, *alone)
        assert [t.numel() > 0 for t in only] == [a and g.numel() > 0 for a, g in zip(alone, got, strict=True)]
        assert_no_worse(only[index].to(got[index].dtype), eager_back[index], wanted_back[index], large_back[index])
    return [y, h, *got]
