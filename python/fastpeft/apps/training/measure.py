"""A few real steps of a run, taken to know how long it lasts and what memory it needs; nothing of them stays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import checkpoints
from .config import TrainConfig
from .data import Dataset
from .loop import Trainer
from .metrics import Progress, Silent, peak_memory_mb
from .run import Prepared, adapted_model, make_tracks
from .track import Track

STEPS = 3
_EVAL_BATCHES, _EVAL_AMONG = 3, 64
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def measure(config: TrainConfig, prepared: Sequence[Prepared], progress: Progress) -> dict[str, Any]:
    """Take the first steps of a run, on its model and data, and an evaluation if it has any; writes no file.

    Returns seconds of each step, of an evaluation and of the whole run by estimate (without loading and checkpoints),
    tokens per second, and memory in bytes: before the model is loaded (on a CPU that of Python and torch), and the
    peaks of the steps and of all. The first step warms up, so the estimate leaves it out where there are others.
    """
    state = checkpoints.random_state()
    try:
        empty, started = memory_now(prepared[0].device), time.monotonic()
        model = adapted_model(*prepared, say=progress.say)
        loading = time.monotonic() - started
        tracks, device = make_tracks(prepared), prepared[0].device
        trainer = Trainer(config, model, tracks, prepared[0].tokenizer.pad_token_id, device, Silent())
        trainer.ready()
        for track in tracks:
            trainer._use([track])
            track.start(model)
        model.train()
        whole, peak = peak_memory_mb(device), _watch(device)
        steps = [_step(trainer, tracks, n) for n in range(min(STEPS, max(len(track.plan) for track in tracks)))]
        peak_bytes = peak()
        evaluations = sum(
            _evaluations(track) * _evaluation(trainer, track, p.held_out)
            for track, p in zip(tracks, prepared, strict=True)
        )
    finally:
        checkpoints.set_random_state(state)
    used = steps[1:] or steps
    rate = sum(tokens for _, tokens in used) / sum(seconds for seconds, _ in used)
    tokens_in_all = sum(
        len(track.plan) / track.plan.in_epoch * p.train.tokens for track, p in zip(tracks, prepared, strict=True)
    )
    return {
        "step_seconds": [seconds for seconds, _ in steps],
        "tokens_per_s": rate,
        "loading_seconds": loading,
        "evaluation_seconds": evaluations,
        "seconds": tokens_in_all / rate + evaluations,
        "peak_bytes": peak_bytes,
        "empty_bytes": empty,
        "process_peak_bytes": max(peak_bytes, round(1e6 * max(whole, peak_memory_mb(device)))),
    }


def _step(trainer: Trainer, tracks: Sequence[Track], number: int) -> tuple[float, int]:
    """(seconds, tokens) of a step."""
    lines = trainer._step(number, [track for track in tracks if number < len(track.plan)])
    return lines[0]["seconds"], sum(line["tokens"] for line in lines)


def _evaluations(track: Track) -> int:
    """How often a run evaluates: before its first step, every so many, and at the end."""
    every, steps = track.config.eval_every, len(track.plan)
    return 0 if not track.evaluates else 2 + ((steps - 1) // every if every else 0)


def _evaluation(trainer: Trainer, track: Track, held_out: Dataset) -> float:
    """Seconds of an evaluation: a few batches stand for all that is held out."""
    if not track.evaluates:
        return 0.0
    trainer._use([track])
    seconds = 0.0
    if len(track.held_out):
        first = list(islice(track.held_out, _EVAL_AMONG))
        batches = first[:: math.ceil(len(first) / _EVAL_BATCHES)]
        started = time.monotonic()
        trainer.loss.evaluate(batches, trainer.device)
        seconds += (time.monotonic() - started) * held_out.tokens / sum(batch.tokens for batch in batches)
    if track.samples is not None:
        started = time.monotonic()
        track.samples.take(trainer.model)
        seconds += time.monotonic() - started
    return seconds


def _watch(device: torch.device) -> Callable[[], int]:
    """Forget the peak of memory so far; returns a function that gives the peak since, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: int(torch.cuda.max_memory_allocated(device))
    try:
        _CLEAR.write_text("5")  # Linux: the peak of the resident set
    except OSError:
        return lambda: round(1e6 * peak_memory_mb(device))

    return lambda: _of_status("VmHWM")


def memory_now(device: torch.device) -> int:
    """Memory that is held now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _of_status("VmRSS") if _STATUS.exists() else round(1e6 * peak_memory_mb(device))


def _of_status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
