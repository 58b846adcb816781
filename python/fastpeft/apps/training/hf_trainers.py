"""Subclasses of transformers' Trainer and TRL's DPOTrainer: a batch is a step of a track, with all of its passes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from . import models
from .config import TrainConfig
from .data import Example
from .errors import UserError
from .forward import CompletionLoss
from .packing import Batch, collate
from .preferences import columns
from .track import Track

NEVER = 10**9  # steps: what is due is decided by a callback


class OfTrack(transformers.Trainer):
    """Runs the steps of a track, whatever the loss is.

    checkpoint: writes one of ours, in the place of transformers' own. now: the numbers of the step that runs, as in its
    line of metrics.jsonl.
    """

    track: Track
    checkpoint: Callable[[], None]
    now: dict[str, int]

    def get_train_dataloader(self) -> Any:
        """A loader of nothing, as long as there are steps: transformers counts by it."""
        return self.accelerator.prepare(DataLoader(range(len(self.track.plan)), batch_size=1))  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The next step of the track, made when it is needed; all of its passes are one batch to transformers."""
        epoch, passes = self.track.passes(self.state.global_step)
        examples = [example for rows in passes for row in rows for example in row]
        self.now = {
            "epoch": epoch, "tokens": sum(map(len, examples)), "learned_tokens": sum(e.learned for e in examples)
        }  # fmt: skip
        return [{"passes": [self.one_pass(rows) for rows in passes]}], None

    def one_pass(self, rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
        """Inputs of one forward pass."""
        raise NotImplementedError

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a step's passes; the sum of their losses, each of which has its share."""
        passes = inputs["passes"]
        self.current_gradient_accumulation_steps = len(passes)
        total = torch.zeros((), device=self.args.device)
        for one in passes:
            total += super().training_step(model, one, self.items())
        return total

    def items(self) -> int | None:
        """The number that the step's losses are divided by; None if each pass has a mean of its own."""
        return None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """The held-out loss, where there is something held out; `Following` adds the answers to prompts."""
        if self.track.held_out_examples:
            return super().evaluate(*args, **kwargs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

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
    pad_id: int
    offload: AbstractContextManager[Any]

    def one_pass(self, rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
        batch = collate(rows, self.pad_id)
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}

    def items(self) -> int:
        return self.now["learned_tokens"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self.offload:
            return self.completion_loss(Batch(**inputs)) / num_items_in_batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self.track.held_out_examples:
            return super().evaluate()
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
    # The data sets are named for what transformers checks; it takes neither.
    trainer = CompletionTrainer(model, _one_device(arguments), train_dataset=[], eval_dataset=[])
    trainer.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens already
    trainer.completion_loss, trainer.track, trainer.pad_id = loss, track, pad_id
    return trainer


def _arguments(config: TrainConfig, track: Track, device: torch.device) -> dict[str, Any]:
    """Arguments of all trainers. What our loop and `Following` see to is switched off."""
    return {
        "output_dir": config.output, "run_name": Path(config.output).name, "report_to": list(config.report_to),
        "max_steps": len(track.plan), "gradient_accumulation_steps": 1, "seed": config.seed,
        "per_device_train_batch_size": config.batch_size, "per_device_eval_batch_size": max(4, config.batch_size),
        "max_grad_norm": config.max_grad_norm, "use_cpu": device.type == "cpu", "bf16": False, "fp16": False,
        "logging_steps": 1, "logging_nan_inf_filter": False, "disable_tqdm": True, "remove_unused_columns": False,
        "save_strategy": "steps", "save_steps": NEVER, "eval_steps": NEVER,
        "eval_strategy": "steps" if track.evaluates else "no", "dataloader_pin_memory": False,
        "metric_for_best_model": "eval_loss" if track.held_out_examples else None, "greater_is_better": False,
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

        def one_pass(self, rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
            found: dict[str, Any] = self.data_collator([columns(example) for row in rows for example in row])
            return found

    def table(examples: Iterable[Example | None]) -> Any:
        return Table.from_list([columns(example) for example in examples if example is not None])

    weights = [(p, p.data) for p in model.parameters() if p.requires_grad]
    try:
        arguments = DPOConfig(
            **{"max_length": None, "gradient_checkpointing": False,
               "gradient_checkpointing_kwargs": {"use_reentrant": False},
               **_arguments(config, track, device), **config.dpo},
        )  # fmt: skip
        trainer = PreferenceTrainer(
            model, args=_one_device(arguments), train_dataset=table(itertools.islice(filter(None, track.examples), 1)),
            eval_dataset=table(track.held_out_examples) if track.held_out_examples else [],
            processing_class=models.load_tokenizer(models.resolve(config.model, config.quantize)),
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"objective: dpo: {' '.join(str(error).split())}", "correct the settings") from error
    for p, data in weights:  # of an adapter on a quantised base TRL makes bfloat16
        p.data = data
    trainer.track = track
    return trainer
