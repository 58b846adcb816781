"""Models that take images: their language part with `accelerate` is no worse than without, beside float64."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import fastpeft
from fastpeft.families.switch import is_switched, switched_as
from forms import matrix

_HERE = Path(__file__)
_tools, _vision = (runpy.run_path(str(_HERE.with_name(name))) for name in ("families_tools.py", "vision_tools.py"))
adapted, compare, draws, errors_of, seed = (
    _tools[name] for name in ("adapted", "compare", "draws", "errors_of", "seed")
)  # fmt: skip
FAMILIES, inputs, tiny = (_vision[name] for name in ("FAMILIES", "inputs", "tiny"))
F32, BF16 = torch.float32, torch.bfloat16
SETTINGS = (("dense", "none", False), ("nf4", "lora", True))  # base, adapter, padding


@pytest.mark.parametrize(("name", "dtype", "setting", "image"), matrix(
    itertools.product(FAMILIES, (F32, BF16), SETTINGS, (True, False)),
    short=[("mllama", F32, SETTINGS[1], True)],
))  # fmt: skip
def test_outputs_and_gradients(name: str, dtype: torch.dtype, setting: Any, image: bool) -> None:
    base, adapter, padded = setting
    found, trained = [], adapter != "none"
    for draw in draws(name):
        seed(name, draw)
        model = adapted(tiny(name, dtype), base, adapter).train(trained)
        found.append(errors_of(model, inputs(name, dtype, image, padded), trained, dtype))
    compare(found, dtype)


def layers_served(name: str) -> tuple[int, int]:
    """Layers of the language part whose attention, and whose MLP or experts, are ours: of all adapted ones."""
    model = adapted(tiny(name, F32), "nf4", "lora")
    served = fastpeft.accelerate(model).served
    attention = sum(n for (part, _), n in served.items() if part == "attention")
    attention -= sum("vision" in path and is_switched(module) and switched_as(module) == "attention"
                     for path, module in model.named_modules())  # fmt: skip
    return attention, sum(n for (part, _), n in served.items() if part in ("MLPs", "experts"))


@pytest.mark.parametrize("name", matrix(FAMILIES, short=["mllama"]))
def test_the_language_part_is_served(name: str) -> None:
    """Every layer's attention, that to an image as well, and MLP; with experts, an MLP beside them or before."""
    layers = 3 if name == "mllama" else 2
    attention, mlps = layers_served(name)
    assert attention == layers
    assert mlps >= layers
