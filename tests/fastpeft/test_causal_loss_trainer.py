"""Trainer with `accelerate(loss=True)` beside the same Trainer without: every option gives the losses it gave."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fastpeft
import peft
import transformers
from fastpeft.recipes.lazy_logits import LazyLogits
from forms import matrix

_tools = runpy.run_path(str(Path(__file__).with_name("loss_tools.py")))
V, Wide, agree, made, small_chunks = (_tools[n] for n in ("V", "Wide", "agree", "made", "small_chunks"))
STEPS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "accumulation": {"gradient_accumulation_steps": 2}, "smoothing": {"label_smoothing_factor": 0.1},
    "bf16": {"bf16": True}, "checkpointing": {"gradient_checkpointing": True}, "neftune": {"neftune_noise_alpha": 0.5},
    "loss only": {"prediction_loss_only": True}, "max_grad_norm": {"max_grad_norm": 0.01},
}  # fmt: skip


def data() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, V, (17,), generator=g) for _ in range(24)]
    return [{"input_ids": row, "labels": row.masked_fill(torch.arange(17) < 5 + i % 4, -100)}
            for i, row in enumerate(rows)]  # fmt: skip


def run(folder: Path, chunked: bool, **options: Any) -> tuple[list[float], dict[str, float], Any]:
    """Losses of the steps, metrics of an evaluation, and the report."""
    model = peft.get_peft_model(made(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    report = fastpeft.accelerate(model, layers=False, loss=True) if chunked else None
    seen: list[type] = []

    def predicted(logits: Any, labels: Any) -> Any:
        seen.append(type(logits))
        return logits.argmax(-1)

    def metrics(found: Any) -> dict[str, float]:
        return {"right": float((found.predictions[:, :-1] == found.label_ids[:, 1:]).mean())}

    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=3, max_steps=STEPS, optim="sgd", learning_rate=0.3, use_cpu=True,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        seed=0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data(), eval_dataset=data()[:6], compute_metrics=metrics,
        preprocess_logits_for_metrics=predicted,
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    found = {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_right")}
    if chunked and "label_smoothing_factor" not in options:
        assert set(seen) <= {LazyLogits}
    return losses, found, report


@pytest.mark.parametrize("option", matrix(OPTIONS, ["accumulation", "smoothing"]))
def test_losses_and_metrics(option: str, tmp_path: Path) -> None:
    theirs, metrics, _ = run(tmp_path, False, **OPTIONS[option])
    ours, found, report = run(tmp_path, True, **OPTIONS[option])
    assert len(ours) == STEPS
    coarse = 2.0**-8 if option == "bf16" else 2.0**-16  # float32's, over some steps of training
    assert all(abs(a - b) <= coarse * abs(b) for a, b in zip(ours, theirs, strict=True))
    assert abs(found["eval_loss"] - metrics["eval_loss"]) <= coarse * metrics["eval_loss"]
    if option != "bf16":
        assert found.get("eval_right") == metrics.get("eval_right")
    assert bool(report.chunked) == (option != "smoothing")  # which takes the labels away from the model


def test_predictions_are_the_logits(tmp_path: Path) -> None:
    model = made()
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    plain = transformers.Trainer(model=model, args=arguments).predict(data()[:6])
    fastpeft.accelerate(model, layers=False, loss=True)
    ours = transformers.Trainer(model=model, args=arguments).predict(data()[:6])
    assert (ours.predictions == plain.predictions).all()
    assert agree(ours.metrics["test_loss"], plain.metrics["test_loss"])


def test_a_step_of_trainer_never_holds_all_logits(tmp_path: Path) -> None:
    with Wide() as wide:
        run(tmp_path, True)
    assert wide.seen == set()
