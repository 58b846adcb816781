"""Other people's training loops on quicker layers and a loss by chunks: `accelerate`, `unaccelerate`, their report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from weakref import ref

from torch import nn

from ..families import switch
from ..families.report import Table, look
from ..families.ways import BY_CHOICE
from . import causal_loss
from .lazy_logits import Watch


@dataclass
class Acceleration:
    """The outcome of `accelerate`, to be printed.

    modules: layers that compute in a quicker way; losses: models whose loss is computed by chunks; reasons: what was
    asked for and is not there. `served` and `stays` say by part of the layers what computes it, or why the model's own
    code does, as of now. `chunked` and `whole` count forwards of the model with labels. `remove()` takes all of it
    back.
    """

    modules: int = 0
    losses: int = 0
    reasons: list[str] = field(default_factory=list)
    _model: ref[nn.Module] | None = None
    _watches: list[Watch] = field(default_factory=list)

    @property
    def served(self) -> Table:
        """(part of a layer, operators and their backends) -> how many."""
        return self._look()[0]

    @property
    def stays(self) -> Table:
        """(part of a layer, why it is the model's own code) -> how many."""
        return self._look()[1]

    @property
    def shortfalls(self) -> list[str]:
        """Lines on what was asked for and is not had: `reasons`, and of `stays` all but what is so by choice."""
        stays = [f"{n} {part} as they were: {why}" for (part, why), n in self.stays.items()
                 if why not in BY_CHOICE.values()]  # fmt: skip
        return [*self.reasons, *stays]

    def _look(self) -> tuple[Table, Table]:
        model = None if self._model is None else self._model()
        return (Table(), Table()) if model is None else look(model)

    @property
    def chunked(self) -> int:
        """How many losses were computed by chunks."""
        return sum(watch.chunked for watch in self._watches)

    @property
    def whole(self) -> Counter[str]:
        """Why all logits were held at once, and how often."""
        return sum((watch.whole for watch in self._watches), Counter())

    def remove(self) -> None:
        """Put back the classes that were there."""
        model = None if self._model is None else self._model()
        if model is not None:
            unaccelerate(model)
        self.modules = self.losses = 0

    def __str__(self) -> str:
        served, stays = self._look()
        lines = [f"layers: {self.modules} run the quicker way"]
        lines += [f"  {n} {part}: {by}" for (part, by), n in served.items()]
        lines += [f"  {n} {part} as they were: {why}" for (part, why), n in stays.items()]
        lines += [f"loss: by chunks in {self.losses} model(s), {self.chunked} times so far"]
        lines += [f"not served: {why}" for why in self.reasons]
        lines += [f"all logits at once, {n} times: {why}" for why, n in self.whole.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, layers: bool = True, loss: bool = False, huge_pages: bool = True) -> Acceleration:
    """Let a model of transformers train and decode quicker and with less memory, in place; it may have adapters of
    fastpeft or of PEFT, or none. Numbers stay the same up to rounding.

    layers: quicker layers of the families that are described (docs/families.md): on a CPU norms, projections,
    attention, MLPs and experts, on a GPU the same around torch's attention, wherever the kernels run. loss: with
    `labels` given the loss is computed by chunks of tokens (and of the vocabulary where the head is one dense matrix),
    forward and backward, and `logits` of the output is a tensor that is made when it is first used, [..., vocabulary]
    in the model's dtype. On any device, for any head. huge_pages: put the weights of a model on a CPU into huge pages
    of memory where the system has them.
    May be called again, also for the other part. What cannot be served runs the model's own code; the returned report
    says why. Raises ValueError where nothing of what was asked for can be had, and changes nothing then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate(model) takes a torch.nn.Module, got {type(model).__name__}")
    report = Acceleration(_model=ref(model))
    if loss:
        report.losses, report.reasons = causal_loss.put_loss(model)
    if layers:
        _layers(report, model, huge_pages)
    if not report.modules and not report.losses and (layers or loss):
        raise ValueError("nothing to accelerate: " + "; ".join(report.reasons))
    report._watches = causal_loss.watches(model)
    return report


def _layers(report: Acceleration, model: nn.Module, huge_pages: bool) -> None:
    try:
        switch.accelerate(model, huge_pages)
    except ValueError as error:  # no layer that is known, or no kernel for where they are
        report.reasons.append(str(error))
    report.modules = sum(map(switch.is_switched, model.modules()))


def unaccelerate(model: nn.Module) -> int:
    """Take back all that `accelerate` did to a model: how many of its modules were changed (0: none was)."""
    count = causal_loss.take_loss(model)
    for module in model.modules():
        if switch.is_switched(module):
            switch.switch_back(module)
            count += 1
    return count
