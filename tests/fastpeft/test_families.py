"""Models of every described family: with `accelerate` no worse than without, beside float64, and undone."""

from __future__ import annotations

import inspect
import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import fastpeft
from fastpeft.families.registry import families
from forms import matrix

_tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
FAMILIES, adapted, compare, exactly, tiny = (
    _tools[name] for name in ("FAMILIES", "adapted", "compare", "exactly", "tiny")
)
F32, BF16 = torch.float32, torch.bfloat16
SHORT = ("gemma2", "phi3", "cohere")  # caps, norms with an offset and windows; fused projections; neighbours and means
# base, adapter, training, padding, checkpointing
SETTINGS = (
    ("dense", "none", False, False, False), ("dense", "lora", True, True, False), ("nf4", "lora", True, False, True),
    ("nf4", "dora", True, True, False), ("nf4", "none", False, True, False),
)  # fmt: skip


def inputs(rows: int, tokens: int, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(model: Any, given: dict[str, Tensor], trained: bool) -> tuple[Tensor, Tensor]:
    """Logits where no padding is, and gradients of what trains, or of the embedded input."""
    model.zero_grad()
    seen = given["attention_mask"].bool()
    embedded = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = None if trained else model.get_input_embeddings().register_forward_hook(keep)
    logits = model(**given, use_cache=False).logits[seen]
    if handle is not None:
        handle.remove()
    logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None] if trained else [embedded[0].grad[seen]]
    return logits.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize(("name", "dtype", "setting", "shape"), matrix(
    itertools.product(FAMILIES, (F32, BF16), SETTINGS, ("groups", "one")),
    lambda name, dtype, setting, shape: name in SHORT and shape == "groups" and (dtype is F32) == (setting[0] == "nf4"),
))  # fmt: skip
def test_outputs_and_gradients(name: str, dtype: torch.dtype, setting: Any, shape: str) -> None:
    base, adapter, training, padded, checkpointing = setting
    model = adapted(tiny(name, dtype, shape), base, adapter).train(training)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    given = inputs(2, 11, padded)
    trained = adapter != "none"
    plain = logits_and_gradients(model, given, trained)
    with exactly(model) as exact_model:
        exact = logits_and_gradients(exact_model, given, trained)
    report = fastpeft.accelerate(model)
    assert report.modules
    fast = logits_and_gradients(model, given, trained)
    for ours, theirs, right in zip(fast, plain, exact, strict=True):
        compare(ours.to(dtype), theirs.to(dtype), right)  # adapters are float32, what is rounded is the model's dtype
    report.remove()
    again = logits_and_gradients(model, given, trained)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))


def test_every_description_has_a_model_here() -> None:
    language_parts = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"}
    assert set(families()) - language_parts == set(FAMILIES)


TOKENS = 32
NO_STATIC = ("gemma4", "nemotron_h")


def behind(model: Any, report: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How far the exact logits of the chosen tokens are below the largest, at most; eager's largest error."""
    report.remove()
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(model.get_base_model().forward).parameters:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        eager = model(**given).logits[:, -TOKENS - 1 : -1]
        with exactly(model) as exact_model:
            exact = exact_model(**given).logits[:, -TOKENS - 1 : -1]
    chosen = exact.gather(-1, ids[:, -TOKENS:, None]).squeeze(-1)
    return (exact.amax(-1) - chosen).max(), (eager.double() - exact).abs().max()


@pytest.mark.parametrize(("name", "dtype", "base", "padded", "static"), matrix(
    [(name, dtype, base, padded, static) for name in FAMILIES for dtype in (F32, BF16)
     for base, padded, static in (("dense", False, False), ("nf4", True, False), ("dense", True, True))],
    lambda name, dtype, base, padded, static: name in SHORT and base == "nf4" and dtype is BF16,
))  # fmt: skip
def test_generating(name: str, dtype: torch.dtype, base: str, padded: bool, static: bool) -> None:
    """Greedy tokens are equal in float32; in bfloat16 each one's exact logit is as near to the largest as eager's."""
    if static and name in NO_STATIC:
        pytest.skip("transformers has no static cache for it")
    model = adapted(tiny(name, dtype), base, "lora")
    given = inputs(2, 8, padded)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    if static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    plain = model.generate(**given, **options)
    report = fastpeft.accelerate(model)
    fast = model.generate(**given, **options)
    assert fast.shape == plain.shape == (2, 8 + TOKENS)
    if dtype is F32:
        assert torch.equal(fast, plain)
        return
    mask = torch.cat((given["attention_mask"], torch.ones(2, TOKENS, dtype=torch.long)), -1)
    short, error = behind(model, report, fast, mask)
    assert short <= error


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_training_after_inference_mode(name: str) -> None:
    """Nothing that a forward in inference mode kept is used by a later one; a mask of it has no version to compare."""
    model, given = tiny(name), inputs(2, 11, True)
    seen = given["attention_mask"].bool()
    with torch.inference_mode():
        plain = model(**given).logits[seen]
        fastpeft.accelerate(model)
        compare(model(**given).logits[seen], plain, plain.double())
    logits_and_gradients(model, given, False)
