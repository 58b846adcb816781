"""AdamW of many tensors by the native library, at every level, beside torch's in float32 and against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fastpeft.recipes.optimizers.adamw import AdamW
from lora_tools import level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import adamw
from peft_kernels.testing import assert_no_worse, assert_same_bits

level = level_fixture()
pytestmark = needs_native
SHAPES = [(1,), (17, 3), (16, 576), (0, 4), (130, 260), ()]  # of one task, of several, of none
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def gradients(step: int, factor: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    return [factor * torch.randn(shape, generator=g) for shape in SHAPES]


def made(kind: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """An optimizer over the same parameters, in two groups."""
    g = torch.Generator().manual_seed(9)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in SHAPES]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "lr": 1e-2}]
    return kind(groups, **{**OPTIONS, **more})


def parameters_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizer: Any, steps: range, factor: float = 1.0, **more: Any) -> None:
    for step in steps:
        for p, g in zip(parameters_of(optimizer), gradients(step, factor), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step(**more)


def numbers(optimizer: Any) -> list[Tensor]:
    names = ("exp_avg", "exp_avg_sq", "step")
    return [t for p in parameters_of(optimizer) for t in (p.detach(), *(optimizer.state[p][name] for name in names))]


@pytest.mark.parametrize("maximize", [False, True])
def test_as_torch_in_float64(level: str, maximize: bool) -> None:
    ours, eager = made(AdamW, maximize=maximize), made(torch.optim.AdamW, fused=True, maximize=maximize)
    exact = made(torch.optim.AdamW, torch.float64, fused=True, maximize=maximize)
    for optimizer in (ours, eager, exact):
        run(optimizer, range(5))
    for mine, theirs, best in zip(numbers(ours), numbers(eager), numbers(exact), strict=True):
        assert_no_worse(mine, theirs, best, torch.ones_like(best))


def test_a_scale_is_of_the_gradients_that_stay(level: str) -> None:
    ours, theirs = made(AdamW), made(AdamW)
    run(ours, range(3), scale=0.25)
    run(theirs, range(3), 0.25)
    for mine, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert_same_bits(mine, other)
    for p, g in zip(parameters_of(ours), gradients(2, 1.0), strict=True):
        assert_same_bits(p.grad, g)


def test_the_bits_do_not_depend_on_threads(level: str) -> None:
    found = []
    for n in (1, 2):
        with threads(n):
            optimizer = made(AdamW)
            run(optimizer, range(3))
            found.append([*numbers(optimizer), torch.tensor(adamw.norm(gradients(0, 1.0)))])
    for one, two in zip(*found, strict=True):
        assert_same_bits(one, two)


def test_norm(level: str) -> None:
    given = gradients(1, 3.0)
    exact = torch.cat([g.double().flatten() for g in given]).norm()
    found = torch.tensor(adamw.norm(given), dtype=torch.float32)
    assert_no_worse(found, torch.nn.utils.get_total_norm(given), exact)
    assert adamw.norm([]) == 0.0
    assert adamw.norm([torch.tensor([1.0, float("nan")])]) != adamw.norm([])


def test_states_go_either_way() -> None:
    """A run that the other optimizer continues is the run of one: the state is the same dictionary."""
    exact, eager = made(torch.optim.AdamW, torch.float64, fused=True), made(torch.optim.AdamW, fused=True)
    run(exact, range(4))
    run(eager, range(4))
    for first, second in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)):
        begun, continued = (made(kind, **({} if kind is AdamW else {"fused": True})) for kind in (first, second))
        run(begun, range(2))
        with torch.no_grad():
            for p, q in zip(parameters_of(continued), parameters_of(begun), strict=True):
                p.copy_(q)
        continued.load_state_dict(copy.deepcopy(begun.state_dict()))
        run(continued, range(2, 4))
        for mine, theirs, best in zip(numbers(continued), numbers(eager), numbers(exact), strict=True):
            assert_no_worse(mine, theirs, best, torch.ones_like(best))


def test_other_gradients_and_parameters() -> None:
    p = torch.nn.Parameter(torch.randn(4, 6))
    unused = torch.nn.Parameter(torch.randn(3))
    optimizer = AdamW([p, unused], **OPTIONS)
    before, twin = unused.detach().clone(), torch.nn.Parameter(p.detach().clone())
    p.grad = torch.randn(6, 4).t()  # columns one after the other
    optimizer.step()
    assert_same_bits(unused.detach(), before)
    assert not optimizer.state[unused]
    other = AdamW([twin], **OPTIONS)
    twin.grad = p.grad.contiguous()
    other.step()
    assert_same_bits(p.detach(), twin.detach())
    loss = twin.square().sum()
    other.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as after torch's step
        loss.backward()
    for wrong in (torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.bfloat16), torch.randn(4, 6).t()):
        with pytest.raises(ValueError, match=r"contiguous float32 tensors.*torch\.optim\.AdamW"):
            AdamW([torch.nn.Parameter(wrong)], **OPTIONS)
    with pytest.raises(ValueError, match="dense float32 gradients"):
        adamw.norm([torch.randn(3, dtype=torch.float64)])


def test_what_is_kept_between_steps_follows_every_change() -> None:
    """Other moments, other memory, other sizes and forms of the same objects: each step is that of a new optimizer."""

    def other_moments(optimizer: Any, p: Tensor) -> None:
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"] * 2

    def other_memory(optimizer: Any, p: Tensor) -> None:
        optimizer.state[p]["exp_avg_sq"].data = optimizer.state[p]["exp_avg_sq"] * 3
        p.data = p.data.clone()

    def smaller(optimizer: Any, p: Tensor) -> None:
        for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]):
            t.data = t.data[:4]  # where it was

    def loaded(optimizer: Any, p: Tensor) -> None:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def less_often(optimizer: Any, p: Tensor) -> None:
        optimizer.param_groups[0]["params"][0].grad = None

    for change in (other_moments, other_memory, smaller, loaded, less_often):
        g = torch.Generator().manual_seed(5)
        start = [torch.randn(6, 4, generator=g) for _ in range(3)]
        found = []
        for keeps in (True, False):
            parameters = [torch.nn.Parameter(t.clone()) for t in start]
            optimizer = AdamW(parameters, **OPTIONS)
            for step in range(4):
                for p in parameters:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                if step == 2:
                    change(optimizer, parameters[1])
                    parameters[1].grad = torch.ones_like(parameters[1])
                if not keeps:
                    optimizer.__dict__.pop("_kept", None)
                norm = optimizer.norm([p.grad for p in parameters if p.grad is not None])
                optimizer.step(scale=1.0 / norm)
            found.append([p.detach() for p in parameters] + [optimizer.state[p]["exp_avg"] for p in parameters])
        for mine, other in zip(*found, strict=True):
            assert_same_bits(mine, other)


def test_what_lies_otherwise_since_the_last_step_is_refused() -> None:
    p = torch.nn.Parameter(torch.randn(6, 6))
    optimizer = AdamW([p], **OPTIONS)
    p.grad = torch.randn(6, 6)
    optimizer.step()
    before, p.data = p.data, p.data.t()  # the same memory
    with pytest.raises(ValueError, match="contiguous float32"):
        optimizer.step()
    p.data = before
    p.grad.data = torch.randn(3, 6)
    with pytest.raises(ValueError, match="of one size"):
        optimizer.step()
