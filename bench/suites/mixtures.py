"""Mixtures of LoRA adapters in the suite of methods: Poly and Arrow on its layer, X-LoRA in the small Llama of the
prompts, whose classifier trains. Eight adapters (Poly: skills) at PEFT's defaults; PEFT beside."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import Candidate
from ..results import Claim, Row
from . import prompts

ADAPTERS, TASKS = 8, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Make = Callable[[Any], nn.Module]  # given a package (fastpeft or peft)


def saved(model: Callable[[], nn.Module], targets: list[str], folder: Path) -> list[str]:
    """Folders of LoRA adapters that are not at their start."""
    import fastpeft

    def one(i: int) -> str:
        torch.manual_seed(i)
        base = model()
        torch.manual_seed(i)
        config = fastpeft.LoraConfig(target_modules=targets, init_lora_weights=False)
        fastpeft.get_peft_model(base, config).save_pretrained(folder / str(i), save_embedding_layers=False)
        return str(folder / str(i))

    return [one(i) for i in range(ADAPTERS)]


def on_a_layer(
    base: Callable[[], nn.Module], chosen: Callable[[str], bool], folder: Path
) -> Iterator[tuple[str, Make, dict[str, Tensor]]]:
    """(name, the model by a package, arguments of its forward beside x) of mixtures on `lin` of the base."""

    def poly(package: Any) -> nn.Module:
        config = package.PolyConfig(target_modules=["lin"], n_tasks=TASKS, n_skills=ADAPTERS)
        model: nn.Module = package.get_peft_model(base(), config)
        # without a task_type PEFT's PeftModel gives task_ids to the base model
        return model.base_model if package.__name__ == "peft" else model  # type: ignore[return-value]

    def arrow(package: Any, paths: list[str]) -> nn.Module:
        model: nn.Module = package.create_arrow_model(base(), paths, package.ArrowConfig(rng_seed=0))
        return model

    if chosen("POLY"):
        yield "POLY", poly, {"task_ids": torch.arange(TASKS)}
    if chosen("ARROW"):
        yield "ARROW", functools.partial(arrow, paths=saved(base, ["lin"], folder)), {}


def xlora(package: Any, paths: list[str]) -> nn.Module:
    """The small Llama with an X-LoRA in training."""
    base = prompts.base()
    base.config.use_cache = False
    own = {str(i): path for i, path in enumerate(paths)}
    config = package.XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=own)
    model: nn.Module = package.get_peft_model(base, config)
    return model.train()


def one_lora(package: Any) -> nn.Module:
    model: nn.Module = package.get_peft_model(prompts.base(), package.LoraConfig(target_modules=TARGETS))
    return model.train()


def rows(chosen: Callable[[str], bool]) -> Iterator[Row]:
    """X-LoRA's row."""
    import fastpeft
    import peft

    if not chosen("XLORA"):
        return
    ids = torch.randint(5, prompts.VOCABULARY, (prompts.ROWS, prompts.LENGTH))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = saved(prompts.base, TARGETS, Path(folder))
        models = {"ours": xlora(fastpeft, paths), "PEFT": xlora(peft, paths), "ours, one LoRA": one_lora(fastpeft)}
    candidates = [Candidate(name, [prompts.step(model, **given)]) for name, model in models.items()]
    claims = [Claim("PEFT", ["ours"], ["PEFT"], 1.0), Claim("one LoRA", ["ours"], ["ours, one LoRA"])]
    case = {"suite": "methods", "method": "XLORA", "tokens": prompts.LENGTH, "adapters": ADAPTERS}
    yield Row(f"XLORA step, {prompts.ROWS} x {prompts.LENGTH}", case, {}, claims, candidates=candidates)
