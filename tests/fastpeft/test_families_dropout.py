"""Dropout of attention's probabilities under `accelerate`: unbiased, transformers' with the same mask, repeatable."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

import fastpeft
from lora_tools import needs_native

from peft_kernels import draw_seed, philox
from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
FAMILIES, adapted, exactly, tiny, worst = (
    tools[name] for name in ("FAMILIES", "adapted", "exactly", "tiny", "worst")
)
pytestmark = needs_native
P = 0.2
# The option of a family's configuration: a number or a module of the attention; projections apart or in one.
OPTIONS = {"llama": "attention_dropout", "gpt2": "attn_pdrop", "opt": "attention_dropout"}


@pytest.fixture(params=OPTIONS)
def dropping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A model of a family whose attention drops P of its probabilities, and nothing else."""
    name = request.param
    of_type, options = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, (of_type, {**options, OPTIONS[name]: P}))
    torch.manual_seed(0)
    return lambda **sizes: tiny(name, **sizes)


def tokens(rows: int) -> Tensor:
    return torch.randint(3, 97, (rows, 7), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits and the gradients of all that trains, with the same seeds at each call."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_mean_of_many_is_attention_without_dropout(dropping: Callable[..., Any]) -> None:
    """The attention's output is linear in the kept probabilities. Each mean of `rows` draws is within its standard
    error times the normal quantile that all of them pass but for once in a million such tests."""
    rows, model = 2048, dropping(layers=1)
    report = fastpeft.accelerate(model)
    (attention,) = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    found: list[Tensor] = []
    attention.register_forward_hook(lambda module, args, output: found.append(output[0].double()))
    with torch.no_grad():
        model(input_ids=tokens(1), use_cache=False)
        torch.manual_seed(2)
        model.train()(input_ids=tokens(1).expand(rows, -1), use_cache=False)
    assert report.served["attention", "attention (native)"] == 1
    without, many = found
    error = many.std(0) / math.sqrt(rows)
    assert (error > 0).all(), "dropout acts"
    most = NormalDist().inv_cdf(1 - 1e-6 / (2 * without.numel()))
    assert ((many.mean(0) - without[0]).abs() <= most * error).all()


class SameMasks(TorchFunctionMode):
    """Torch's attention by its formula, with the masks that the op makes of the seeds that it draws."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (t.repeat_interleave(args[0].shape[1] // t.shape[1], 1) for t in args)
        (batch, heads, t, _), s = q.shape, k.shape[2]
        scores = q @ k.transpose(-1, -2) * kwargs["scale"]
        mask = torch.ones(t, s, dtype=torch.bool).tril() if kwargs["is_causal"] else kwargs["attn_mask"]
        p = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        assert kwargs["dropout_p"] == P
        keep = philox.keep_mask(batch * heads * t, s, P, draw_seed()).view(p.shape)
        return (p * keep / (1 - P)) @ v


def test_outputs_and_gradients_are_transformers_with_the_same_masks(dropping: Callable[..., Any]) -> None:
    model, ids = adapted(dropping(), "dense", "lora").train(), tokens(2)
    with SameMasks():
        plain = logits_and_gradients(model, ids)
    with exactly(model) as exact_model, SameMasks():
        exact = logits_and_gradients(exact_model, ids)
    fastpeft.accelerate(model)
    fast = logits_and_gradients(model, ids)
    for mine, theirs, right in zip(fast, plain, exact, strict=True):
        # an element is one of many sums of the whole model: the largest errors are compared
        errors = [worst(t, right).to(mine.dtype) for t in (mine, theirs)]
        assert_no_worse(*errors, torch.zeros((), dtype=right.dtype), right.abs().max())


def test_checkpointing_makes_the_masks_again(dropping: Callable[..., Any]) -> None:
    model, ids = adapted(dropping(), "dense", "lora").train(), tokens(2)
    fastpeft.accelerate(model)
    want = logits_and_gradients(model, ids)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for mine, same in zip(logits_and_gradients(model, ids), want, strict=True):
        assert_same_bits(mine, same)
