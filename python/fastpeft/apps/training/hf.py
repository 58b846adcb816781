"""A run by transformers' Trainer, or by TRL's: the model, batches, optimizer, schedule and files of our own loop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from . import checkpoints, models
from .hf_follow import Following
from .hf_trainers import NEVER, make_trainer
from .loop import Result, Trainer
from .metrics import MetricsFile, peak_memory_mb
from .optim import learning_rate
from .output import METRICS_NAME
from .stop import Stops
from .track import Track


class HFTrainer(Trainer):
    """`loop.Trainer` with the steps run by transformers: one adapter, learned as ``config.objective`` says.

    A step's examples are those of our loop, in its order, and so are losses, optimizer, learning rate and random
    numbers; checkpoints are ours, and either trainer goes on from the other's. What transformers adds is around it:
    reports, stopping early, and with TRL other losses.
    """

    def run(self, resume: bool = False, restart: bool = False) -> dict[str, Result]:
        """As `Trainer.run`. With early stopping the model ends with the adapter of the best evaluation."""
        started = time.monotonic()
        (track,) = self.tracks
        with models.quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of TRL's ways to call transformers
            # TRL takes the adapter as it is now for the reference: before a checkpoint is loaded into it.
            inner = make_trainer(self.config, self.model, track, self.device, self.loss, self.pad_id)
            inner.offload = self.offload
            self._start(resume, restart)
            inner.args.eval_on_start = track.done == 0 and track.evaluates
            inner.remove_callback(PrinterCallback)
            stopping = self._stopping(inner, track)
            first, steps = track.done, len(track.plan)
            metrics = MetricsFile(Path(self.config.output) / METRICS_NAME, {track.name: first})
            stops = Stops(self.progress.notice)
            following = Following(inner, metrics, self.progress, self.device, stops, checkpoints.random_state())
            inner.add_callback(following)
            inner.checkpoint = lambda: self._checkpoint(inner, track, metrics, stopping)
            self.progress.start(steps, first)
            over = stopping is not None and stopping.early_stopping_patience_counter >= stopping.early_stopping_patience
            try:
                if first < steps and not over:
                    inner.optimizer, inner.lr_scheduler = track.optimizer, self._schedule(track)
                    with stops.watching(), self._state(track) as folder:
                        inner.train(resume_from_checkpoint=folder)
            finally:
                self.progress.stop()
                metrics.close()
        if "ref" in self.model.peft_config and track.name != "ref":
            self.model.delete_adapter("ref")  # TRL's copy of the adapter as it was at the start
        self._take_best(track)
        self.model.eval()
        seconds, peak = time.monotonic() - started, peak_memory_mb(self.device)
        return {
            track.name: Result(track.done, track.resumed_from, track.before, track.after, track.tokens, seconds, peak)
        }

    def _schedule(self, track: Track) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rates of `optim.learning_rate`, from the step that is next."""
        peak, steps = self.config.learning_rate, len(track.plan)
        for group in track.optimizer.param_groups:
            group["initial_lr"] = peak * group["scale"]
        return torch.optim.lr_scheduler.LambdaLR(
            track.optimizer, lambda step: learning_rate(self.config, step, steps) / peak, track.done - 1
        )

    def _stopping(self, inner: Any, track: Track) -> EarlyStoppingCallback | None:
        """transformers' callback for it, with its count and the best evaluation so far."""
        if not self.config.early_stopping_patience:
            return None
        stored = track.resumed_extra.get("early_stopping", {})
        stopping = EarlyStoppingCallback(self.config.early_stopping_patience, self.config.early_stopping_threshold)
        stopping.early_stopping_patience_counter = stored.get("without_improvement", 0)
        track.extra["early_stopping"] = stored
        track.spare = stored.get("best_step")
        inner.add_callback(stopping)
        return stopping

    @contextmanager
    def _state(self, track: Track) -> Iterator[str | None]:
        """A folder with what transformers reads of a run that it goes on with; None for one that begins."""
        if track.done == 0:
            yield None
            return
        best = track.extra.get("early_stopping", {})
        state = TrainerState(
            global_step=track.done, best_metric=best.get("best_loss"), best_global_step=best.get("best_step"),
            logging_steps=1, eval_steps=NEVER, save_steps=NEVER, train_batch_size=self.config.batch_size,
        )  # fmt: skip
        with TemporaryDirectory() as folder:
            state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))
            yield folder

    def _checkpoint(
        self, inner: Any, track: Track, metrics: MetricsFile, stopping: EarlyStoppingCallback | None
    ) -> None:
        metrics.sync()
        if stopping is not None:
            track.extra["early_stopping"] = {
                "without_improvement": stopping.early_stopping_patience_counter,
                "best_loss": inner.state.best_metric, "best_step": inner.state.best_global_step,
            }  # fmt: skip
            track.spare = inner.state.best_global_step
        track.save()

    def _take_best(self, track: Track) -> None:
        best = track.extra.get("early_stopping", {}).get("best_step")
        if best is None:
            return
        if best != track.done:
            checkpoints.put_adapter(track.root / f"checkpoint-{best}", self.model, track.name)
        track.after = track.extra["early_stopping"]["best_loss"]
        self.progress.say(f"after step {track.done}: the adapter is that of step {best}, the best evaluation")
