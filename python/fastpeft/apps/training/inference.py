"""A base model, perhaps with an adapter, that answers prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import models
from .config import nearest
from .data import Encoder
from .errors import UserError
from .gguf_base import names_gguf, storage_of

_BATCH = 8
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Answer:
    """``complete`` is False where ``max_new_tokens`` cut the answer."""

    text: str
    tokens: int
    seconds: float
    complete: bool


@dataclass
class Answerer:
    """Holds model and tokenizer; ``note`` says in words what was loaded, ``slow`` why layers run transformers' code."""

    model: Any
    tokenizer: Any
    template: str = "auto"
    note: str = ""
    slow: Sequence[str] = ()

    @classmethod
    def load(
        cls,
        model: str | None,
        adapter: str | None,
        *,
        quantize: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        template: str = "auto",
        cache_quantized: bool = False,
        say: Callable[[str], object] | None = None,
    ) -> Answerer:
        """Load the base (by default the adapter's own, quantised as in its training) and the adapter on it.

        cache_quantized, say: as `cache` and `say` of `models.load_base`.
        """
        note = adapter_note(adapter) if adapter is not None else {}
        name = model or base_of(adapter, note)
        for given, value, choices in (
            ("quantize", quantize, ("auto", "none", "nf4", "fp4", "gguf")),
            ("dtype", dtype, _DTYPES),
        ):
            if value not in choices:
                raise UserError(
                    f"{given}: expected one of {', '.join(choices)}, got {value!r}", nearest(value, choices)
                )
        usual = "gguf" if names_gguf(name) else "none"
        storage = storage_of(name, str(note.get("quantize", usual)) if quantize == "auto" else quantize)
        source = models.resolve(name, storage)
        where = models.pick_device(device)
        compute = models.pick_dtype(str(note.get("dtype", "auto")) if dtype == "auto" else dtype, where)
        tokenizer = models.load_tokenizer(source)
        base = models.load_base(source, compute, where, storage, note, cache=cache_quantized, say=say)
        if adapter is not None:
            from ... import PeftModel

            base = PeftModel.from_pretrained(base, adapter)
        base.eval()
        slow = models.speed_up(base)
        chosen = str(note.get("template", "auto")) if template == "auto" else template
        stored = {"none": "dense", "gguf": "as it lies"}.get(storage, storage)
        text = f"{source.note}, {stored}, {str(compute).removeprefix('torch.')}"
        return cls(base, tokenizer, chosen, text, slow)

    def answer(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        adapters: Sequence[str] | None = None,
        batch: int = _BATCH,
    ) -> list[Answer]:
        """Answers to all prompts, computed in batches of up to ``batch``, padded on the left.

        adapters: which of the model's adapters answers each prompt, "__base__" for none; by default the active one.
        """
        import torch

        encoder = Encoder(self.tokenizer, self.template)
        device = next(p for p in self.model.parameters() if p.device.type != "meta").device
        pad, ends = self.tokenizer.pad_token_id, end_tokens(self.model, self.tokenizer)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
        )
        torch.manual_seed(seed)
        answers: list[Answer] = []
        for start in range(0, len(prompts), batch):
            ids = [encoder.prompt_ids(prompt) for prompt in prompts[start : start + batch]]
            rows = {} if adapters is None else {"adapter_names": list(adapters[start : start + batch])}
            width = max(len(i) for i in ids)
            inputs = torch.tensor([[pad] * (width - len(i)) + i for i in ids], device=device)
            mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=device)
            started = time.monotonic()
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=inputs, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad,
                    eos_token_id=ends, **sampling, **rows,
                )  # fmt: skip
            seconds = (time.monotonic() - started) / len(ids)
            for row in out[:, width:].tolist():
                end = next((i for i, token in enumerate(row) if token in ends), len(row))
                text = self.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
                answers.append(Answer(text, min(len(row), end + 1), seconds, end < len(row)))
        return answers


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's own generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)


def adapter_note(adapter: str) -> dict[str, Any]:
    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter} has no adapter_config.json, so it is no adapter", "give the folder that training wrote"
        )
    return models.training_note(folder) if folder.is_dir() else {}


def base_of(adapter: str | None, note: dict[str, Any]) -> str:
    """The base model that an adapter names: our training's note first, then its adapter_config.json."""
    if adapter is None:
        raise UserError("neither a model nor an adapter is given", "give --model or --adapter")
    if note.get("base"):
        return str(note["base"])
    from ... import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise UserError(f"{adapter} does not name its base model", "give --model")
    return str(base)
