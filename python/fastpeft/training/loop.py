"""The training loop."""

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
from .errors import UserError
from .forward import CompletionLoss
from .metrics import MetricsFile, Progress, peak_memory_mb
from .optim import learning_rate, make_optimizer, set_learning_rate
from .packing import Batch, Plan, collate, eval_batches


@dataclass(frozen=True)
class Result:
    """What a run came to; losses are means per learned token."""

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
    """Trains the adapter of ``model`` on ``examples`` as ``config`` says; the model stays on ``device``."""

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        pad_id: int,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.config, self.model, self.pad_id, self.device, self.progress = config, model, pad_id, device, progress
        self.examples = examples
        self.plan = make_plan(config, examples)
        self.held_out = eval_batches(held_out, config.max_length, max(4, config.batch_size), config.packing, pad_id)
        self.loss = CompletionLoss(model, config.loss_chunk_vocab, config.loss_chunk_tokens)
        self.root = Path(config.output)

    def run(self, resume: bool = False) -> Result:
        """Train from the start, or from the newest intact checkpoint; writes metrics.jsonl and checkpoints."""
        config, steps = self.config, len(self.plan)
        started = time.monotonic()
        self.loss.self_check(self.examples, config.packing, self.pad_id, self.device)
        if config.gradient_checkpointing:
            self.loss.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # transformers lets the embeddings' output require gradients, for the reentrant kind; here it only costs.
            self.loss.base.disable_input_require_grads()
        set_seed(config.seed)
        optimizer = make_optimizer(self.model, config)
        done, before, after = self._resume(optimizer) if resume else (0, None, None)
        if not resume:
            _refuse_mixture(self.root)
        metrics = MetricsFile(self.root / "metrics.jsonl", done if done else None)
        tokens = 0
        self.progress.start(steps, done)
        try:
            if done == 0 and self.held_out:
                before = after = self.loss.evaluate(self.held_out, self.device)
                first = {"step": 0, "held_out_loss": before, "peak_memory_mb": peak_memory_mb(self.device)}
                metrics.write(first)
                self.progress.step(first)
            self.model.train()
            for step in range(done, steps):
                line = self._step(step, optimizer)
                tokens += line["tokens"]
                last = step + 1 == steps
                if self.held_out and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                    line["held_out_loss"] = after = self.loss.evaluate(self.held_out, self.device)
                metrics.write(line)
                self.progress.step(line)
                if last or (config.save_every and (step + 1) % config.save_every == 0):
                    extra = {"fingerprint": self.plan.fingerprint, "held_out_before": before, "held_out_after": after}
                    checkpoints.save(self.root, step + 1, self.model, optimizer, extra, config.keep_checkpoints)
        finally:
            self.progress.stop()
            metrics.close()
        self.model.eval()
        seconds = time.monotonic() - started
        return Result(steps, done, before, after, tokens, seconds, peak_memory_mb(self.device))

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """One optimizer step: the gradient is that of the mean over all learned tokens of all its forward passes."""
        started = time.monotonic()
        epoch, passes = self.plan.steps[step]
        batches = [self._batch(rows) for rows in passes]
        learned = sum(batch.targets.numel() for batch in batches)
        rate = learning_rate(self.config, step, len(self.plan))
        set_learning_rate(optimizer, rate)
        total = 0.0
        for batch in batches:
            if not batch.targets.numel():
                continue
            loss = self.loss(batch.to(self.device)) / learned
            loss.backward()  # type: ignore[no-untyped-call]  # torch's has no types
            total += float(loss.detach())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or float("inf")))
        if not (norm < float("inf") and total == total):
            raise UserError(
                f"step {step + 1}: the loss is {total} and the gradient norm {norm}: training diverged",
                "lower learning_rate, raise warmup, or use dtype=float32",
            )
        optimizer.step()
        # AdaLoRA and AdaMSS move their budget, by the gradients
        allocate = getattr(self.model, "update_and_allocate", None)
        if allocate is not None:
            allocate(step + 1)
        optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        tokens = sum(batch.tokens for batch in batches)
        return {
            "step": step + 1, "epoch": epoch, "loss": total, "lr": rate, "grad_norm": norm, "tokens": tokens,
            "learned_tokens": learned, "tokens_per_s": tokens / seconds, "seconds": seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }  # fmt: skip

    def _batch(self, rows: list[list[int]]) -> Batch:
        return collate([[self.examples[i] for i in row] for row in rows], self.pad_id)

    def _resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, float | None, float | None]:
        """(steps done, held-out loss before training, and at the checkpoint or before it)."""
        folder = checkpoints.newest(self.root)
        if folder is None:
            self.progress.say(f"no intact checkpoint in {self.root}: starting from the beginning")
            return 0, None, None
        stored = checkpoints.load(folder, self.model, optimizer, self.plan.fingerprint)
        self.progress.say(f"resuming from {folder} (step {stored['step']} of {len(self.plan)})")
        return stored["step"], stored["extra"].get("held_out_before"), stored["extra"].get("held_out_after")


def _refuse_mixture(root: Path) -> None:
    """A new run beside old checkpoints would later resume from the wrong one."""
    if checkpoints.numbered(root):
        raise UserError(
            f"{root} holds the checkpoints of an earlier run", "resume it with --resume, or choose another output"
        )


def make_plan(config: TrainConfig, examples: Sequence[Example]) -> Plan:
    return Plan(
        examples,
        seed=config.seed,
        max_length=config.max_length,
        packing=config.packing,
        batch_size=config.batch_size,
        gradient_accumulation=config.gradient_accumulation,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )
