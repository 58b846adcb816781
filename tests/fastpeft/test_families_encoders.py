"""Encoders and encoder-decoders: with `accelerate` no worse than without, beside float64, and undone."""

from __future__ import annotations

import functools
import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import fastpeft
from forms import matrix
from transformers import GenerationMixin

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


TOKENS = 32


@pytest.mark.parametrize(("name", "dtype", "padded", "static"), matrix(
    itertools.product(("t5", "t5 plain", "whisper"), (F32, BF16), (False, True), (False, True)),
    [("t5", F32, False, True)],
))  # fmt: skip
def test_generating(name: str, dtype: torch.dtype, padded: bool, static: bool) -> None:
    """Greedy tokens are equal in float32; in bfloat16 each one's exact logit is as near to the largest as eager's."""
    model = made(name, dtype, "nf4", "lora")
    step = {k: t for k, t in given(name, padded, dtype).items() if k in ("input_ids", "input_features")}
    if padded and name != "whisper":
        step["attention_mask"] = given(name, padded, dtype)["attention_mask"]
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    if static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    # Whisper's own `generate` is for half minutes of speech, around this one
    generate = functools.partial(GenerationMixin.generate, model.get_base_model())
    plain = generate(**step, **options)
    report = fastpeft.accelerate(model)
    fast = generate(**step, **options)
    report.remove()
    assert fast.shape == plain.shape == (2, 1 + TOKENS)
    if dtype is F32:
        assert torch.equal(fast, plain)
        return
    with torch.no_grad():
        eager = model(**step, decoder_input_ids=fast[:, :-1]).logits
        with exactly(model) as exact_model:
            step = {k: t.double() if t.is_floating_point() else t for k, t in step.items()}
            exact = exact_model(**step, decoder_input_ids=fast[:, :-1]).logits
    chosen = exact.gather(-1, fast[:, 1:, None]).squeeze(-1)
    assert (exact.amax(-1) - chosen).max() <= (eager.double() - exact).abs().max()


# Case -> options with which its layers drop outputs, and not the probabilities of attention.
DROPOUTS = {
    "bert": {"hidden_dropout_prob": 0.3}, "modernbert": {"mlp_dropout": 0.3, "embedding_dropout": 0.3},
    "t5": {"dropout_rate": 0.3}, "vit": {"hidden_dropout_prob": 0.3}, "whisper": {"dropout": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("name", matrix([*DROPOUTS], ["modernbert"]))
def test_dropout_of_outputs(name: str) -> None:
    """Of the same random numbers the same outputs: each dropout is where it was."""
    model = made(name, F32, "nf4", "lora", **DROPOUTS[name]).train()
    for module in model.modules():
        if type(module).__name__ == "T5Attention":
            module.dropout = 0.0
    step, outputs = given(name, True, F32), []
    for turn in ("own", "quick", "other numbers"):
        torch.manual_seed(3 if turn == "other numbers" else 2)
        outputs.append(outputs_and_gradients(model, step))
        if turn == "own":
            report = fastpeft.accelerate(model)
            assert any("MLPs" in line and "gated" in line for line in str(report).splitlines())
    for own, quick, other in zip(*outputs, strict=True):
        size = own.abs().max()
        assert (own - quick).abs().max() <= size * torch.finfo(F32).eps ** 0.5 < (own - other).abs().max()
