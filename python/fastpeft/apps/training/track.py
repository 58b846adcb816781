"""One adapter of a run: its data, its optimizer and schedule, its checkpoints and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ... import method_of
from . import checkpoints
from .config import TrainConfig
from .data import Example
from .errors import UserError
from .optim import gradient_norm, learning_rate, make_optimizer, set_learning_rate, update
from .packing import HeldOut, Plan
from .samples import Samples


class Track:
    """An adapter's own part of a run; the model and its forward passes are everyone's.

    name: of the adapter in the model. config: its settings, as of a run of it alone; its checkpoints go to
    ``config.output``. done: steps that are behind it. before, after: held-out losses, means per learned token.
    samples: answers to the prompts of its settings, if it has any.
    extra: what a trainer stores in checkpoints beside, json. spare: the step of a checkpoint that is to stay.
    """

    def __init__(
        self, name: str, config: TrainConfig, examples: Sequence[Example | None], held_out: Sequence[Example | None],
        pad_id: int, samples: Samples | None = None,
    ) -> None:  # fmt: skip
        self.name, self.config, self.samples = name, config, samples
        self.root = Path(config.output)
        self.plan = make_plan(config, examples)
        self.examples = self.plan.examples
        self.held_out_examples = held_out
        self.held_out = HeldOut(held_out, config.max_length, max(4, config.batch_size), config.packing, pad_id)
        self.extra: dict[str, Any] = {}
        self.resumed_extra: dict[str, Any] = {}
        self.spare: int | None = None
        self.done = self.resumed_from = self.tokens = 0
        self.before: float | None = None
        self.after: float | None = None

    def start(self, model: Any) -> None:
        """Make the optimizer, over what trains in ``model`` now."""
        self.model = model
        self.optimizer = make_optimizer(model.named_parameters(), self.config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def passes(self, step: int) -> tuple[int, list[list[list[Example]]]]:
        """(epoch, forward passes of rows of examples) of a step."""
        epoch, passes = self.plan.step(step)
        return epoch, [[[cast("Example", self.examples[i]) for i in row] for row in rows] for rows in passes]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.config, step, len(self.plan))

    def update(self, step: int, loss: float) -> dict[str, float]:
        """One optimizer step with the gradients at hand; the learning rate and the gradient's norm before clipping."""
        rate = self.rate(step)
        set_learning_rate(self.optimizer, rate)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = gradient_norm(self.optimizer, gradients)
        most = self.config.max_grad_norm or float("inf")
        factor = most / (norm + 1e-6) if norm > most else 1.0  # as torch's clip_grad_norm_
        if not (norm < float("inf") and loss == loss):
            of = "" if self.name == "default" else f"adapter {self.name}, "
            raise UserError(
                f"{of}step {step + 1}: the loss is {loss} and the gradient norm {norm}: training diverged",
                "lower learning_rate, raise warmup, or use dtype=float32",
            )
        update(self.optimizer, gradients, factor, in_place=self._allocator() is not None)
        self.allocate(step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return {"lr": rate, "grad_norm": norm}

    def _allocator(self) -> Callable[[Any, int], Any] | None:
        config = self.model.base_model.peft_config[self.name]
        found: Callable[[Any, int], Any] | None = method_of(config).model_methods.get("update_and_allocate")
        return found

    def allocate(self, step: int) -> None:
        """AdaLoRA and AdaMSS move their budget, by the gradients; they do it for the active adapters."""
        allocate = self._allocator()
        if allocate is None:
            return
        tuner = self.model.base_model
        active, tuner.active_adapter = tuner.active_adapter, self.name
        try:
            allocate(tuner, step)
        finally:
            tuner.active_adapter = active

    @property
    def evaluates(self) -> bool:
        """True if there is something held out, or a prompt to answer."""
        return bool(len(self.held_out) or self.samples)

    def is_due(self, every: int, step: int) -> bool:
        """True if what is done every so many steps, and at the end, is due after ``step`` steps."""
        return step == len(self.plan) or bool(every and step % every == 0)

    def save(self) -> Path:
        """Write a checkpoint of where it is; returns its folder."""
        extra = {
            "fingerprint": self.plan.fingerprint, "place": self.plan.place(self.done), "held_out_before": self.before,
            "held_out_after": self.after, **self.extra,
        }  # fmt: skip
        return checkpoints.save(
            self.root, self.done, self.model, self.optimizer, extra, self.config.keep_checkpoints, self.name, self.spare
        )

    def resume(self, restart: bool) -> tuple[str, Any]:
        """Go to the newest intact checkpoint: what to tell of it, and the random states in it (None without one).

        Without any checkpoint, begin. Raises UserError where all are broken, unless ``restart`` allows to begin anew.
        """
        folder = checkpoints.newest(self.root)
        if folder is None:
            broken = ", ".join(p.name for p in checkpoints.numbered(self.root))
            if broken and not restart:
                raise UserError(
                    f"none of the checkpoints in {self.root} is intact ({broken})",
                    "put back one that is, or begin anew with --restart, which removes what the earlier run left",
                )
            if broken:
                checkpoints.clear(self.root)
            return f"no {'intact ' if broken else ''}checkpoint in {self.root}: starting from the beginning", None
        stored = checkpoints.load(folder, self.model, self.optimizer, self.plan.fingerprint, self.name)
        self.done = self.resumed_from = stored["step"]
        if "place" in stored["extra"]:  # else the plan finds it, step by step
            self.plan.go_to(self.done, stored["extra"]["place"])
        self.before, self.after = stored["extra"].get("held_out_before"), stored["extra"].get("held_out_after")
        self.resumed_extra = stored["extra"]
        return f"resuming from {folder} (step {self.done} of {len(self.plan)})", stored["random"]

    def refuse_mixture(self) -> None:
        """A new run beside old checkpoints would later resume from the wrong one."""
        if checkpoints.numbered(self.root):
            raise UserError(
                f"{self.root} holds the checkpoints of an earlier run",
                "resume it with --resume, begin anew with --restart, or choose another output",
            )


def make_plan(config: TrainConfig, examples: Sequence[Example | None]) -> Plan:
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
