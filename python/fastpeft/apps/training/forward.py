"""From a batch to its loss: the backbone runs on all tokens, the head only on those that are learned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ... import NF4Linear, chunked_cross_entropy, cross_entropy_by_rows
from .data import Example
from .errors import UserError
from .packing import Batch, collate

# Options of transformers' models that are factors of what the head makes, and their powers: of Cohere, Granite,
# Falcon-H1 and Muse.
_FACTORS = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1}


class CompletionLoss:
    """Computes the summed loss over a batch's learned tokens, or that of each token.

    model: a transformers causal language model, or an adapter model around one.
    A plain linear head, dense or quantised, goes through `chunked_cross_entropy`. A head that something wraps (an
    adapter on ``lm_head``, a trained copy) is called on ``chunk_tokens`` tokens at a time and recomputed in the
    backward pass.
    """

    def __init__(self, model: Any, chunk_vocab: int = 4096, chunk_tokens: int = 1024) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.base = base
        # Llama 4's causal model has no part of the name that its class gives
        self.backbone: Callable[..., Any] = getattr(base, "model", base) if base.base_model is base else base.base_model
        self.head = base.get_output_embeddings()
        self.model = model
        if self.backbone is base or self.head is None:
            raise UserError(
                f"{type(base).__name__} has no separate backbone and output head",
                "use a causal language model of transformers",
            )
        config = base.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = 1.0
        for name, power in _FACTORS.items():
            self.scale *= float(getattr(config, name, None) or 1.0) ** power
        self.chunk_vocab, self.chunk_tokens = chunk_vocab, chunk_tokens

    def __call__(self, batch: Batch) -> Tensor:
        """Summed loss, a float32 scalar; divide by the learned tokens of the whole optimizer step."""
        return self._losses(batch, "sum", None)

    def by_token(self, batch: Batch, adapters: Sequence[str] | None = None) -> Tensor:
        """The loss of each learned token, [learned]. adapters: each token's, where the rows of the batch differ."""
        return self._losses(batch, "none", adapters)

    def _losses(self, batch: Batch, reduction: Literal["sum", "none"], adapters: Sequence[str] | None) -> Tensor:
        given, before = self._inputs(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        losses = self._of(self.backbone(**given)[0], batch, before, reduction, adapters)
        beside = getattr(self.model, "auxiliary_states", None) if self.base.training else None
        for weight, states in () if beside is None or reduction == "none" else beside():
            losses = losses + weight * self._of(states, batch, before, reduction, adapters)
        return losses

    def _of(
        self, states: Tensor, batch: Batch, before: int, reduction: Literal["sum", "none"],
        adapters: Sequence[str] | None,
    ) -> Tensor:  # fmt: skip
        """Losses by states of the input, and of the `before` vectors of a prompt before it."""
        own = states[:, before:] if before else states
        hidden: Tensor = own.flatten(0, 1).index_select(0, batch.where)
        # a head that `accelerate` switched is a plain linear with a quicker way for few rows
        quantised = type(self.head) is NF4Linear and self.head.compute_dtype in (None, hidden.dtype)
        if type(self.head) is torch.nn.Linear or getattr(type(self.head), "_fastpeft_accelerated", False) or quantised:
            weight = self.head.quant_weight() if quantised else self.head.weight
            found: Tensor = chunked_cross_entropy(
                hidden, weight, batch.targets, self.head.bias, scale=self.scale, softcap=self.softcap,
                chunk_vocab=self.chunk_vocab, chunk_tokens=self.chunk_tokens, native_products=True,
                reduction=reduction,
            )  # fmt: skip
            return found

        def logits(h: Tensor, part: slice) -> Tensor:
            if adapters is None:
                return self._cap(self.head(h).float())
            with self.model.base_model.rows_assigned(adapters[part]):  # for the head a row is a token
                return self._cap(self.head(h).float())

        # A wrapped head's logits exist in full width, so the tokens at once are what bounds them.
        losses: Tensor = cross_entropy_by_rows(logits, hidden, batch.targets, max(1, self.chunk_tokens // 8))
        return losses.sum() if reduction == "sum" else losses

    def _inputs(self, **given: Any) -> tuple[dict[str, Any], int]:
        """Arguments of the backbone, and how many tokens of a prompt they have before the input's."""
        prompted = getattr(self.model, "prompted_inputs", None)
        return (given, 0) if prompted is None else prompted(**given)

    def _cap(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], device: torch.device) -> float:
        """Mean loss per learned token, in eval mode."""
        was_training = self.base.training
        self.base.eval()
        total, learned = 0.0, 0
        try:
            for batch in batches:
                total += float(self(batch.to(device)))
                learned += batch.targets.numel()
        finally:
            self.base.train(was_training)
        return total / max(1, learned)

    @torch.no_grad()
    def self_check(self, examples: Iterable[Example | None], packing: bool, pad_id: int, device: torch.device) -> None:
        """Hold this model to what training assumes; raise `UserError` where it does not.

        On the first tokens of two examples: the loss equals the one from the model's own logits (so backbone and head
        were found right), and one packed row gives the same as two separate rows (so attention stays inside examples).
        """
        first = itertools.islice((e.input_ids[:24] for e in examples if e is not None), 2)
        short = [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in first]
        was_training = self.base.training
        self.base.eval()
        try:
            apart = [collate([[e]], pad_id).to(device) for e in short]
            losses = [float(self(batch)) for batch in apart]
            for batch, loss in zip(apart, losses, strict=True):
                given, before = self._inputs(input_ids=batch.input_ids, use_cache=False)
                logits = self.base(**given).logits[0, before:].float()
                direct = float(torch.nn.functional.cross_entropy(logits[batch.where], batch.targets, reduction="sum"))
                if not math.isfinite(direct):
                    raise UserError(
                        f"{type(self.base).__name__}: its loss is {direct} before any training: weights are NaN or "
                        "infinite, or too large for this dtype",
                        "give a sound model",
                    )
                if not self._close(loss, direct):
                    raise UserError(
                        f"{type(self.base).__name__}: loss over backbone and head is {loss:.5f}, "
                        f"over the model's logits {direct:.5f}",
                        "this architecture changes the logits in a way that is not known here; report it",
                    )
            if packing and len(short) == 2:
                together = float(self(collate([short], pad_id).to(device)))
                if not self._close(together, sum(losses)):
                    raise UserError(
                        f"{type(self.base).__name__}: a packed row gives loss {together:.5f}, its examples alone "
                        f"{sum(losses):.5f}: attention of this model crosses examples",
                        "set packing=false",
                    )
        finally:
            self.base.train(was_training)

    def _close(self, a: float, b: float) -> bool:
        """Equal up to rounding. Crossing moves a trained model's loss by per cents, a random one's by 0.02 %."""
        precise = self.base.dtype == torch.float32 and self.base.device.type == "cpu"  # a GPU may round to TF32
        tolerance = 2e-5 if precise else 1e-2
        return abs(a - b) <= tolerance * max(abs(a), abs(b), 1.0)
