"""The training loop: one adapter, or several at once on one base."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import checkpoints
from .config import TrainConfig
from .data import Example
from .forward import CompletionLoss
from .memory import enable_checkpoints, keep_freed_memory, offloading
from .metrics import MetricsFile, Progress, peak_memory_mb
from .output import CURVE_NAME, METRICS_NAME
from .packing import collate
from .stop import Stops
from .track import Track


@dataclass(frozen=True)
class Result:
    """Results of a run for one adapter; losses are means per learned token, seconds those of the whole run."""

    steps: int
    resumed_from: int
    held_out_before: float | None
    held_out_after: float | None
    tokens: int
    seconds: float
    peak_memory_mb: float


def set_seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


class Trainer:
    """Trains the adapters of ``model`` that the tracks name; the model stays on ``device``.

    A step of several adapters is one forward pass and one backward pass over all their rows. Each adapter's loss is the
    mean over its own tokens, its gradient that of it alone, and a row never reads another: training adapters at once
    gives the adapters that each gets alone. One whose steps are over leaves the batch.
    config: what the run has in common; its metrics.jsonl is in ``config.output``.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tracks: Sequence[Track],
        pad_id: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.config, self.model, self.tracks = config, model, list(tracks)
        self.pad_id, self.device, self.progress = pad_id, device, progress
        if device.type == "cpu":
            keep_freed_memory(but_large=config.gradient_checkpointing)
        self.offload = offloading(config, model)
        self.loss = CompletionLoss(model, config.loss_chunk_vocab, config.loss_chunk_tokens)
        self.several = bool(config.adapters)
        self._used: list[str] = []

    def run(self, resume: bool = False, restart: bool = False) -> dict[str, Result]:
        """Train from the start, or from the newest intact checkpoints; writes metrics.jsonl and checkpoints.

        restart: begin anew where an earlier run left checkpoints; with ``resume``, only where none of them is intact.
        The first SIGINT or SIGTERM ends it after the step it is in, with checkpoints: raises Interrupted or Terminated.
        """
        started = time.monotonic()
        self._start(resume, restart)
        steps = max(len(track.plan) for track in self.tracks)
        first = min((t.done for t in self.tracks if t.done < len(t.plan)), default=steps)
        metrics = MetricsFile(Path(self.config.output) / METRICS_NAME, {t.name: t.done for t in self.tracks})
        self.progress.start(steps, first)
        try:
            lines = [self._first_line(t) for t in self.tracks if t.done == 0 and t.evaluates]
            self._tell(metrics, lines)
            self.model.train()
            stops = Stops(self.progress.notice)
            with stops.watching():
                for step in range(first, steps):
                    # After a resume, one that is ahead of others waits for them.
                    active = [track for track in self.tracks if track.done <= step < len(track.plan)]
                    if active:
                        self._whole_step(step, active, metrics, stops)
        finally:
            self.progress.stop()
            metrics.close()
        self._use(self.tracks[:1])
        self.model.eval()
        seconds, peak = time.monotonic() - started, peak_memory_mb(self.device)
        return {
            t.name: Result(len(t.plan), t.resumed_from, t.before, t.after, t.tokens, seconds, peak) for t in self.tracks
        }

    def _whole_step(self, step: int, active: Sequence[Track], metrics: MetricsFile, stops: Stops) -> None:
        """A step, and what is due after it: held-out losses, lines, checkpoints, the end that a signal asked for."""
        lines = self._step(step, active)
        for track, line in zip(active, lines, strict=True):
            if track.evaluates and track.is_due(track.config.eval_every, step + 1):
                self._evaluate(track, line)
        self._tell(metrics, lines)
        asked = stops.asked
        due = [track for track in active if asked or track.is_due(track.config.save_every, step + 1)]
        if due:
            metrics.sync()
        written = [str(track.save()) for track in due]
        if asked:
            steps = max(len(track.plan) for track in self.tracks)
            problem = f"ended after step {step + 1} of {steps}, as asked; wrote {', '.join(written)}"
            raise stops.error(problem, "go on with --resume")

    def ready(self) -> None:
        """Check the model against what training assumes, and set it up. Raises UserError."""
        for track in self.tracks:
            self._use([track])
            self.loss.self_check(track.examples, track.config.packing, self.pad_id, self.device)
        enable_checkpoints(self.config, self.loss.base)
        set_seed(self.config.seed)

    def _start(self, resume: bool, restart: bool) -> None:
        """Check the model, make the optimizers, and go to where an earlier run was."""
        self.ready()
        states = {}
        for track in self.tracks:
            self._use([track])
            track.start(self.model)
            if resume:
                text, states[track.name] = track.resume(restart)
                self.progress.say(text)
            elif restart:
                checkpoints.clear(track.root)
            else:
                track.refuse_mixture()
        if restart and not any(track.done for track in self.tracks):
            (Path(self.config.output) / CURVE_NAME).unlink(missing_ok=True)
        behind = min(self.tracks, key=lambda t: (t.done >= len(t.plan), t.done))
        if states.get(behind.name) is not None:
            checkpoints.set_random_state(states[behind.name])

    def _use(self, tracks: Sequence[Track]) -> None:
        """Let these adapters train and no others; one alone is the active one, several are chosen row by row."""
        names = [track.name for track in tracks]
        if len(self.tracks) == 1 or names == self._used:
            return
        self.model.set_adapter(names[0])
        self.model.base_model.set_requires_grad(names[1:])
        self._used = names

    def _evaluate(self, track: Track, line: dict[str, Any]) -> None:
        """Put an adapter's held-out loss, and its answers to its prompts, into the line of a step."""
        self._use([track])
        if len(track.held_out):
            line["held_out_loss"] = track.after = self.loss.evaluate(track.held_out, self.device)
        if track.samples is not None:
            line["samples"] = track.samples.take(self.model)

    def _first_line(self, track: Track) -> dict[str, Any]:
        line = {**self._name(track), "step": 0}
        self._evaluate(track, line)
        track.before = track.after
        line["peak_memory_mb"] = peak_memory_mb(self.device)
        return line

    def _name(self, track: Track) -> dict[str, Any]:
        return {"adapter": track.name} if self.several else {}

    def _tell(self, metrics: MetricsFile, lines: Sequence[dict[str, Any]]) -> None:
        """Write the lines of a step, and show them as one."""
        for line in lines:
            metrics.write(line)
        if not lines:
            return
        if not self.several:
            self.progress.step(lines[0])
            return
        shown: dict[str, Any] = {"step": lines[0]["step"], "peak_memory_mb": peak_memory_mb(self.device)}
        if "loss" in lines[0]:
            shown["losses"] = {line["adapter"]: line["loss"] for line in lines}
            shown["tokens_per_s"] = sum(line["tokens_per_s"] for line in lines)
        held_out = {line["adapter"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
        if held_out:
            shown["held_out_loss"] = held_out
        shown["samples"] = [
            {**sample, "adapter": line["adapter"]} for line in lines for sample in line.get("samples", ())
        ]
        self.progress.step(shown)

    def _step(self, step: int, active: Sequence[Track]) -> list[dict[str, Any]]:
        """A step of each adapter: its gradient is that of the mean over all learned tokens of its forward passes."""
        started = time.monotonic()
        self._use(active)
        epochs, passes = zip(*(track.passes(step) for track in active), strict=True)
        learned = [sum(map(_learned, own)) for own in passes]
        totals = [0.0] * len(active)
        for i in range(max(map(len, passes))):
            members = [k for k, own in enumerate(passes) if i < len(own) and _learned(own[i])]
            parts = [(active[k].name, passes[k][i], learned[k]) for k in members]
            for k, loss in zip(members, self._pass(parts) if parts else [], strict=True):
                totals[k] += loss
        tokens = [sum(len(e) for rows in own for row in rows for e in row) for own in passes]
        updates = [track.update(step, total) for track, total in zip(active, totals, strict=True)]
        seconds = time.monotonic() - started
        lines = []
        for k, track in enumerate(active):
            track.done, track.tokens = step + 1, track.tokens + tokens[k]
            lines.append({
                **self._name(track), "step": step + 1, "epoch": epochs[k], "loss": totals[k], **updates[k],
                "tokens": tokens[k], "learned_tokens": learned[k], "tokens_per_s": tokens[k] / seconds,
                "seconds": seconds, "peak_memory_mb": peak_memory_mb(self.device),
            })  # fmt: skip
        return lines

    def _pass(self, parts: Sequence[tuple[str, list[list[Example]], int]]) -> list[float]:
        """Forward and backward of each adapter's rows in one batch; parts: (adapter, rows, what to divide its loss by).

        Returns the losses so divided.
        """
        batch = collate([row for _, rows, _ in parts for row in rows], self.pad_id).to(self.device)
        if len(self._used) <= 1:  # the only one, or the only active one: the model's quickest way
            with self.offload:
                loss = self.loss(batch) / parts[0][2]
            loss.backward()  # type: ignore[no-untyped-call]  # torch's has no types
            return [float(loss.detach())]
        counts = [_learned(rows) for _, rows, _ in parts]
        of_tokens = [name for (name, _, _), count in zip(parts, counts, strict=True) for _ in range(count)]
        with self.offload, self.model.base_model.rows_assigned([name for name, rows, _ in parts for _ in rows]):
            by_token = torch.split(self.loss.by_token(batch, of_tokens), counts)
            means = torch.stack([losses.sum() / part[2] for losses, part in zip(by_token, parts, strict=True)])
            means.sum().backward()  # type: ignore[no-untyped-call]
        result: list[float] = means.detach().tolist()
        return result


def _learned(rows: Sequence[Sequence[Example]]) -> int:
    return sum(example.learned for row in rows for example in row)
