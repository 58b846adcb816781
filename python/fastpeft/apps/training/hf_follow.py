"""A callback of transformers' Trainer that decides what is due after a step, and writes a run's lines as our loop."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from . import checkpoints
from .errors import UserError
from .metrics import MetricsFile, Progress, peak_memory_mb
from .stop import Stops
from .track import Track

_OF_TRANSFORMERS = {"loss", "learning_rate", "grad_norm", "epoch", "eval_loss", "total_flos"}


class Following(TrainerCallback):
    """Follows ``inner``, a trainer of one track. random: the random states that its first step begins with."""

    def __init__(
        self, inner: Any, metrics: MetricsFile, progress: Progress, device: torch.device, stops: Stops,
        random: dict[str, Any],
    ) -> None:  # fmt: skip
        self.inner, self.metrics, self.progress, self.device, self.stops = inner, metrics, progress, device, stops
        self.track: Track = inner.track
        self._random: dict[str, Any] | None = random
        self._ending = False
        self._line: dict[str, Any] = {}
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._random is not None:  # making the loader has drawn since
            checkpoints.set_random_state(self._random)
            self._random = None
        self._started = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.track.allocate(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        track, step = self.track, state.global_step
        seconds = time.monotonic() - self._started
        now = self.inner.now
        track.done, track.tokens = step, track.tokens + now["tokens"]
        self._line = {"step": step, **now, "tokens_per_s": now["tokens"] / seconds, "seconds": seconds}
        control.should_log = True
        control.should_evaluate = track.evaluates and track.is_due(track.config.eval_every, step)
        # With early stopping the adapter of any evaluation may be the one that is taken.
        best_may_be = control.should_evaluate and bool(track.config.early_stopping_patience)
        control.should_save = best_may_be or track.is_due(track.config.save_every, step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and k not in _OF_TRANSFORMERS}
        if "loss" in logs:
            loss, norm, step = float(logs["loss"]), float(logs["grad_norm"]), state.global_step
            if not (norm < float("inf") and loss == loss):
                raise UserError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}: training diverged",
                    "lower learning_rate, raise warmup, or use dtype=float32",
                )
            self._line.update(
                loss=loss, lr=self.track.rate(step - 1), grad_norm=norm,
                peak_memory_mb=peak_memory_mb(self.device), **numbers,
            )  # fmt: skip
            if not control.should_evaluate:
                self._tell(state, control)
        elif "eval_loss" in logs:
            speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
            self._line.update({k.replace("eval_", "held_out_"): v for k, v in numbers.items() if k not in speed})

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        track = self.track
        if state.global_step == 0:
            self._line.update(step=0, peak_memory_mb=peak_memory_mb(self.device))
        if "eval_loss" in kwargs["metrics"]:
            self._line["held_out_loss"] = track.after = kwargs["metrics"]["eval_loss"]
            if state.global_step == 0:
                track.before = track.after
        if track.samples is not None:
            self._line["samples"] = track.samples.take(self.inner.model)
        self._tell(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._ending:
            track = self.track
            written = track.root / f"checkpoint-{track.done}"
            problem = f"ended after step {track.done} of {len(track.plan)}, as asked; wrote {written}"
            raise self.stops.error(problem, "go on with --resume")

    def _tell(self, state: Any, control: Any) -> None:
        """Write and show the line, the last that a step does before its checkpoint; see whether it is to end."""
        self.metrics.write(self._line)
        self.progress.step(self._line)
        self._line = {}
        self._ending = self.stops.asked and state.global_step > 0
        control.should_save |= self._ending
