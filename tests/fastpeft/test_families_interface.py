"""Attention in a forward that stays transformers' own: ours by the name that its configuration shows, or its own."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

import fastpeft

tiny = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))["tiny"]
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def accelerated(name: str) -> tuple[Any, Any]:
    model = tiny(name)
    return model, fastpeft.accelerate(model)


def own_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of the attention that the family would take by itself."""
    eager = name == "deepseek_v4"
    where: Any = importlib.import_module(f"transformers.models.{name}.modeling_{name}") if eager else F
    function = "eager_attention_forward" if eager else "scaled_dot_product_attention"
    own, calls = getattr(where, function), list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(where, function, counted)
    return calls


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "gemma4"])
def test_attention_is_ours_and_nothing_else_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = accelerated(name)
    calls = own_calls(name, monkeypatch)
    chosen, module = model.config._attn_implementation, type(model.model.layers[0].self_attn).__bases__[0]
    served = report.served["attention", f"attention (native) in {module.__name__}'s own code"]
    assert served == len(model.model.layers)
    model(IDS)
    assert not calls
    assert model.config._attn_implementation == chosen
    report.remove()
    model(IDS)
    assert len(calls) == served


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4"])
@pytest.mark.parametrize("case", ["float64", "a bias for a mask"])
def test_what_the_operator_does_not_serve(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = accelerated(name)
    mask: Tensor | None = None
    if case == "float64":
        model.double()
    else:
        mask = torch.full((2, 1, 9, 9), -0.5).tril()
    calls = own_calls(name, monkeypatch)
    assert bool(model(IDS, attention_mask=mask).logits.isfinite().all())
    assert len(calls) == len(model.model.layers)


def test_a_choice_of_attention_is_kept() -> None:
    model, report = accelerated("deepseek_v3")
    model.set_attn_implementation("eager")
    assert report.stays["attention", "the model asks for eager"] == 2
    assert model(IDS, output_attentions=True).attentions[0].shape == (2, 4, 9, 9)
