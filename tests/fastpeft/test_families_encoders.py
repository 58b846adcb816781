"""Encoders and encoder-decoders: with `accelerate` no worse than without, beside float64, and undone."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import fastpeft
from forms import matrix

_here = Path(__file__)
_tools = runpy.run_path(str(_here.with_name("families_tools.py")))
adapted, exactly, no_worse = (_tools[name] for name in ("adapted", "exactly", "no_worse"))
_models = runpy.run_path(str(_here.with_name("encoder_tools.py")))
ENCODERS, encoder, given, outputs_and_gradients = (
    _models[name] for name in ("ENCODERS", "encoder", "given", "outputs_and_gradients")
)
F32, BF16 = torch.float32, torch.bfloat16
# base, adapter, training, padding, checkpointing
SETTINGS = (
    ("dense", "none", True, False, False), ("dense", "lora", True, True, False), ("nf4", "lora", True, False, True),
    ("nf4", "dora", True, True, False), ("nf4", "none", False, True, False),
)  # fmt: skip
SHORT = [("t5", F32, SETTINGS[3]), ("bert", BF16, SETTINGS[1])]


def made(name: str, dtype: torch.dtype, base: str, adapter: str, **options: Any) -> Any:
    """A model on a base with an adapter; without one all of its numbers train that are not in 4 bits."""
    torch.manual_seed(0)
    model = adapted(encoder(name, dtype, **options), base, adapter)
    if adapter == "none":
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
    return model


@pytest.mark.parametrize(("name", "dtype", "setting"), matrix(
    itertools.product(ENCODERS, (F32, BF16), SETTINGS), SHORT,
))  # fmt: skip
def test_outputs_and_gradients(name: str, dtype: torch.dtype, setting: Any) -> None:
    base, adapter, training, padded, checkpointing = setting
    model = made(name, dtype, base, adapter).train(training)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    step = given(name, padded, dtype)
    plain = outputs_and_gradients(model, step)
    with exactly(model) as exact_model:
        exact = outputs_and_gradients(exact_model, step)
    report = fastpeft.accelerate(model)
    assert report.modules
    fast = outputs_and_gradients(model, step)
    for ours, theirs, right in zip(fast, plain, exact, strict=True):
        no_worse(ours.to(dtype), theirs.to(dtype), right)
    report.remove()
    again = outputs_and_gradients(model, step)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))
