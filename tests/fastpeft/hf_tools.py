"""Tools of the tests of `fastpeft train --trainer hf`: a small world, runs of it, what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastpeft.apps.training import run
from fastpeft.apps.training.config import TrainConfig, from_dict
from fastpeft.apps.training.metrics import Silent, read_metrics
from fastpeft.apps.training.testing import make_tiny_model, write_jsonl
from safetensors.torch import load_file


def make_world(folder: Path) -> Path:
    """A model, completions, and pairs of answers."""
    make_tiny_model(folder / "model")
    write_jsonl(folder / "data.jsonl", 40)
    records = [
        {"prompt": f"colour {i}?", "chosen": "It is red" + "!" * (i % 5), "rejected": "No, blue" + "?" * (i % 3)}
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def config(world: Path, output: Path, **changes: Any) -> TrainConfig:
    """Steps of three passes, but those at the end of an epoch, which have fewer."""
    dpo = changes.get("objective") == "dpo"
    values = {
        "model": str(world / "model"), "data": str(world / ("pairs.jsonl" if dpo else "data.jsonl")),
        "output": str(output), "eval_fraction": 0.2, "max_length": 64, "batch_size": 2, "gradient_accumulation": 3,
        "dtype": "float32", "max_steps": 7, "learning_rate": 1e-2, "eval_every": 3, "save_every": 3,
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0 if dpo else 0.1, "target_modules": "all-linear"},
    }  # fmt: skip
    return from_dict({**values, **changes})


class Lines(Silent):
    """The lines of a run as its trainer told them, and what it said; ``then`` is called with each."""

    def __init__(self, then: Callable[[dict[str, Any]], object] | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.then = then

    def step(self, line: dict[str, Any]) -> None:
        self.lines.append(dict(line))
        if self.then is not None:
            self.then(line)

    def say(self, text: str) -> None:
        self.said.append(text)

    def column(self, key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([line[key] for line in self.lines if key in line], dtype=dtype)


def train(
    settings: TrainConfig, trainer: str = "hf", progress: Lines | None = None,
    change: Callable[[Any], Any] = lambda model: model, **how: Any,
) -> tuple[Any, Any, Lines]:  # fmt: skip
    """(result, model, lines) of a run. change: of the model, before it is trained."""
    prepared = run.prepare_all(settings)
    progress = progress or Lines()
    model = change(run.adapted_model(*prepared))
    results, model = run.train_all(settings, prepared, progress, model=model, trainer=trainer, **how)
    return results["default"], model, progress


def written(output: Path, *left_out: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for times and memory."""
    never = {"tokens_per_s", "seconds", "peak_memory_mb", *left_out}
    return [{k: v for k, v in line.items() if k not in never} for line in read_metrics(output / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
