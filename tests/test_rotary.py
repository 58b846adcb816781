"""rotary: native at every level and torch's formula against float64, and what attention turns by itself."""

from __future__ import annotations

import math

import pytest
import torch
from lora_tools import BF16, F32, FLOATS, level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import attention, rotary, use_backend
from peft_kernels.ops.attention import _turned
from peft_kernels.testing import assert_no_worse, assert_same_bits

level = level_fixture("reference")
# B, T, H, G, D, R, rows of angles, interleaved
SHAPES = [(1, 1, 1, 1, 2, 2, 1, False), (3, 1, 6, 2, 64, 64, 3, False), (2, 5, 4, 2, 34, 16, 1, True),
          (1, 40, 8, 8, 80, 48, 1, False), (2, 3, 2, 1, 18, 18, 2, True), (0, 4, 2, 1, 16, 16, 1, False)]  # fmt: skip


def inputs(shape: tuple[int, ...], dtype: torch.dtype, of_angles: torch.dtype | None = None) -> tuple[Tensor, ...]:
    b, t, h, g, d, r, rows, _ = shape
    angles = torch.rand(rows, t, r) * 2 * math.pi
    cos, sin = (table.to(of_angles or dtype) for table in (angles.cos(), angles.sin()))
    return torch.randn(b, t, h, d).to(dtype), torch.randn(b, t, g, d).to(dtype), cos, sin


def exact(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _turned(x.double(), cos.double(), sin.double(), interleaved).transpose(1, 2)


def magnitude(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """|x cos| + |x' sin|"""
    one, other = eager(x, cos.double(), 0 * sin.double(), interleaved), eager(x, 0 * cos, sin.double(), interleaved)
    return one.abs() + other.abs()


def eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As a model's own code has it, each step rounded."""
    r = cos.shape[-1]
    part, c, s = x[..., :r], cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        partner = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        partner = torch.cat((-part[..., r // 2 :], part[..., : r // 2]), -1)
    return torch.cat((part * c + partner * s, x[..., r:]), -1)


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(level: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, cos, sin = inputs(shape, dtype)
    for mine, x in zip(rotary(q, k, cos, sin, interleaved=shape[-1]), (q, k), strict=True):
        assert mine.shape == x.shape
        assert mine.dtype is dtype
        given = cos, sin, shape[-1]
        assert_no_worse(mine, eager(x, *given), exact(x, *given), magnitude(x.double(), *given))


@needs_native
def test_strides_and_tables_of_another_type(level: str) -> None:
    q, k, cos, sin = inputs(SHAPES[3], BF16, F32)
    wide = torch.randn(1, 40, 20, 80).to(BF16)
    wide[:, :, 3:11], wide[:, :, 11:19] = q, k
    apart = rotary(q, k, cos, sin)
    for mine, same in zip(rotary(wide[:, :, 3:11], wide[:, :, 11:19], cos, sin), apart, strict=True):
        assert_same_bits(mine, same)
    turned_round = q.transpose(2, 3).contiguous().transpose(2, 3)  # features that are not dense
    assert_same_bits(rotary(turned_round, k, cos, sin)[0], apart[0])


@needs_native
def test_any_number_of_threads_gives_the_same_bits() -> None:
    given = inputs((2, 60, 8, 4, 64, 64, 1, False), BF16)
    with threads(1):
        want = rotary(*given)
    with threads(5):
        for mine, same in zip(rotary(*given), want, strict=True):
            assert_same_bits(mine, same)


@needs_native
def test_attention_turns_by_the_same_numbers() -> None:
    q, k, cos, sin = inputs((2, 9, 4, 2, 16, 16, 1, False), F32)
    v = torch.randn_like(k)
    with use_backend("native"):
        whole = attention(q, k, v, scale=0.25, cos=cos, sin=sin)
        apart = attention(*rotary(q, k, cos, sin), v, scale=0.25)
    assert_same_bits(whole, apart)


def test_gradients() -> None:
    q, k, cos, sin = (t.double() for t in inputs((2, 3, 2, 1, 6, 4, 2, False), F32))
    for interleaved in (False, True):

        def both(q: Tensor, k: Tensor, by: bool = interleaved) -> Tensor:
            return torch.cat(rotary(q, k, cos, sin, interleaved=by), 2)

        assert torch.autograd.gradcheck(both, (q.requires_grad_(), k.requires_grad_()))


def test_bad_arguments() -> None:
    q, k, cos, sin = inputs((2, 3, 2, 1, 6, 4, 2, False), F32)
    for args, what in (
        ((q[0], k, cos, sin), r"q must be \[B, T, H, D\]"), ((q, k[:, :2], cos, sin), "cos must be None where"),
        ((q, k.half(), cos, sin), "k must be"), ((q, k, cos[..., :3], sin), "cos must be"),
        ((q, k, cos, sin.half()), "sin must be"), ((q, k, torch.ones(2, 3, 8), sin), "cos must be"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=what):
            rotary(*args)
