"""Subclasses of transformers' Trainer and TRL's DPOTrainer: a batch is a step of a track, with all of its passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import models
from .config import TrainConfig
from .errors import UserError
from .forward import CompletionLoss
from .packing import Batch, collate
from .preferences import Pair
from .track import Track

NEVER = 10**9  # steps: what is due is decided by a callback


class Steps(Dataset[dict[str, Any]]):
    """The steps of a track: the forward passes of each, as ``collate`` makes one of rows of numbers of examples."""

    def __init__(self, track: Track, collate: Callable[[Sequence[Sequence[int]]], dict[str, Any]]) -> None:
        self.plan, self.collate = track.plan, collate

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> dict[str, Any]:
        return {"passes": [self.collate(rows) for rows in self.plan.steps[step][1]]}


class OfTrack(transformers.Trainer):
    """What a trainer of transformers needs to run a track's steps. checkpoint: writes ours, in the place of its own."""

    steps: Steps
    checkpoint: Callable[[], None]

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(self.steps, batch_size=1, collate_fn=lambda one: one[0])
        return self.accelerator.prepare(loader)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a step's passes; the sum of their losses, each of which has its share."""
        passes = inputs["passes"]
        self.current_gradient_accumulation_steps = len(passes)
        total = torch.zeros((), device=self.args.device)
        for one in passes:
            total += super().training_step(model, one, self.items(passes))
        return total

    def items(self, passes: Sequence[dict[str, Any]]) -> int | None:
        """The number that the step's losses are divided by; None if each pass has a mean of its own."""
        return None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # it knows one batch, and no quantised weights

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoint()

    # A checkpoint's contents are in their places before `train`; it reads the number of the step alone.
    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...
    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None: ...
    def _load_rng_state(self, checkpoint: Any) -> None: ...
    def _load_scaler(self, checkpoint: Any) -> None: ...


class CompletionTrainer(OfTrack):
    """Learns completions, by the loss of our own loop."""

    completion_loss: CompletionLoss
    track: Track

    def items(self, passes: Sequence[dict[str, Any]]) -> int:
        return sum(one["targets"].numel() for one in passes)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return self.completion_loss(Batch(**inputs)) / num_items_in_batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        metrics = {"eval_loss": self.completion_loss.evaluate(self.track.held_out, self.args.device)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def make_trainer(
    config: TrainConfig, model: Any, track: Track, device: torch.device, loss: CompletionLoss, pad_id: int
) -> Any:
    """The trainer of a track by the run's objective, not yet begun; its optimizer and schedule are to be set."""
    if config.objective == "dpo":
        return _dpo(config, model, track, device)
    arguments = transformers.TrainingArguments(**_arguments(config, track, device))
    held_out: Any = track.held_out_examples or None
    trainer = CompletionTrainer(model, _one_device(arguments), train_dataset=track.examples, eval_dataset=held_out)
    trainer.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens already
    trainer.completion_loss, trainer.track = loss, track
    trainer.steps = Steps(track, lambda rows: _fields(collate([[track.examples[i] for i in r] for r in rows], pad_id)))
    return trainer


def _fields(batch: Batch) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _arguments(config: TrainConfig, track: Track, device: torch.device) -> dict[str, Any]:
    """Arguments of all trainers. What our loop and `Following` see to is switched off."""
    return {
        "output_dir": config.output, "run_name": Path(config.output).name, "report_to": list(config.report_to),
        "max_steps": len(track.plan), "gradient_accumulation_steps": 1, "seed": config.seed,
        "per_device_train_batch_size": config.batch_size, "per_device_eval_batch_size": max(4, config.batch_size),
        "max_grad_norm": config.max_grad_norm, "use_cpu": device.type == "cpu", "bf16": False, "fp16": False,
        "logging_steps": 1, "logging_nan_inf_filter": False, "disable_tqdm": True, "remove_unused_columns": False,
        "save_strategy": "steps", "save_steps": NEVER, "eval_steps": NEVER,
        "eval_strategy": "steps" if track.held_out_examples else "no", "dataloader_pin_memory": False,
        "metric_for_best_model": "eval_loss", "greater_is_better": False,
    }  # fmt: skip


def _one_device(arguments: Any) -> Any:
    """The arguments for one process on one device; several GPUs in sight would get copies of the model otherwise."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _dpo(config: TrainConfig, model: Any, track: Track, device: torch.device) -> Any:
    from datasets import Dataset as Table
    from transformers.utils import import_utils

    if not import_utils.is_peft_available():
        raise UserError(
            f"objective: dpo needs a PEFT that transformers {transformers.__version__} takes, and finds none",
            "install transformers below 5.24, or a newer peft",
        )
    from trl import DPOConfig, DPOTrainer

    class PreferenceTrainer(OfTrack, DPOTrainer):  # type: ignore[misc]
        """Learns to prefer, by TRL's losses; the data is encoded already."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    def table(examples: Sequence[Any]) -> Any:
        return Table.from_list([pair.columns for pair in examples if isinstance(pair, Pair)])

    try:
        arguments = DPOConfig(
            **{"learning_rate": config.learning_rate, "max_length": None, "gradient_checkpointing": False,
               "gradient_checkpointing_kwargs": {"use_reentrant": False},
               **_arguments(config, track, device), **config.dpo},
        )  # fmt: skip
        weights = [(p, p.data) for p in model.parameters() if p.requires_grad]
        trainer = PreferenceTrainer(
            model, args=_one_device(arguments), train_dataset=table(track.examples),
            eval_dataset=table(track.held_out_examples) if track.held_out_examples else None,
            processing_class=models.load_tokenizer(models.resolve(config.model)),
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"objective: dpo: {' '.join(str(error).split())}", "correct the settings of dpo") from error
    for p, data in weights:  # of an adapter on a quantised base TRL makes bfloat16
        p.data = data

    def rows(numbers: Sequence[Sequence[int]]) -> dict[str, Any]:
        found: dict[str, Any] = trainer.data_collator([trainer.train_dataset[i] for row in numbers for i in row])
        return found

    trainer.steps = Steps(track, rows)
    return trainer
