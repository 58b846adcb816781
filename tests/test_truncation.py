"""The floor for sums on tensor cores, which cut off where others round, on such sums simulated in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import testing

COLUMNS, BITS = 128, 24  # outputs of a simulated product; significant bits of float32


def cut(v: Tensor, like: Tensor) -> Tensor:
    """float64 v, cut off toward zero below the last bit of a float32 as large as `like`."""
    unit = torch.exp2(torch.frexp(like).exponent - BITS).double()
    return torch.trunc(v / unit) * unit


def tensor_core(x: Tensor, addends: list[Tensor], group: int) -> Tensor:
    """The sum over rows of x [K, N] times each addend, as a tensor core makes it: `group` products and the sum so far
    are cut off below the last bit of the largest of them, and their sum at 24 bits."""
    total = torch.zeros(x.shape[1], dtype=torch.float32)
    for addend in reversed(addends):  # each has its own sum
        running = torch.zeros(x.shape[1], dtype=torch.float64)
        for products in (x.double() * addend.double()).split(group):
            terms = torch.cat((running[None], products))
            largest = terms.abs().amax(0).clamp_min(2.0**-126)
            summed = cut(terms, largest).sum(0)
            running = cut(summed, summed.abs().clamp_min(2.0**-126))
        total = total + running.float()
    return total


def split(y: Tensor) -> list[Tensor]:
    """float32 y as three bfloat16."""
    high = y.bfloat16().float()
    middle = (y - high).bfloat16().float()
    return [high, middle, (y - high - middle).bfloat16().float()]


def operands(terms: int, positive: bool) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(terms)
    x, y = (torch.randn(terms, COLUMNS, generator=g) for _ in range(2))
    return (x.abs(), y.abs()) if positive else (x.bfloat16().float(), y)


def check(made: Tensor, x: Tensor, y: Tensor) -> None:
    products = x.double() * y.double()
    eager = products.sum(0).float()  # as good as eager code can be: nothing is allowed on its account
    testing.assert_no_worse(made, eager, products.sum(0), products.abs().sum(0), len(x))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "_truncates", lambda actual: True)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("terms", "group"), [(576, 8), (4096, 4), (14336, 16)])
def test_a_right_sum_passes(terms: int, group: int, positive: bool) -> None:
    x, y = operands(terms, positive)
    x = x.bfloat16().float()
    check(tensor_core(x, split(y), group), x, y)


@pytest.mark.parametrize("terms", [576, 4096])
@pytest.mark.parametrize("wrong", ["an addend is lost", "one TF32 product", "a step is lost", "a step comes twice"])
def test_a_wrong_sum_fails(wrong: str, terms: int) -> None:
    x, y = operands(terms, False)
    step = terms // 2
    if wrong == "an addend is lost":
        made = tensor_core(x, split(y)[::2], 8)
    elif wrong == "one TF32 product":
        made = tensor_core(x, [(y.view(torch.int32) & ~0x1FFF).view(torch.float32)], 8)
    else:
        times = 0 if wrong == "a step is lost" else 2
        scaled = y.clone()
        scaled[step : step + 16] *= times
        made = tensor_core(x, split(scaled), 8)
    with pytest.raises(AssertionError, match="worse than eager"):
        check(made, x, y)


def test_elsewhere_the_floor_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long sum that was cut off, not rounded, is an error where nothing cuts off."""
    x, y = operands(4096, True)
    x = x.bfloat16().float()
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="worse than eager"):
        check(tensor_core(x, split(y), 4), x, y)
