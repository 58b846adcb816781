"""`generate` with prompts: arguments that let transformers' own bookkeeping of positions, masks, beams and caches count
the virtual tokens. Lengths are of the input's tokens and new ones alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.types import warn
from ..prompts.batch import Prompts
from ..prompts.cache import filled_cache
from .adapters import repeats
from .prompted import Batch, extend_mask, length_of
from .tuner import AUXILIARY_KWARGS, BaseTuner


def generate(tuner: BaseTuner, rows: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The base model's `generate` for rows with prompts. rows: a name for each row, or one for all."""
    model: Any = tuner.model
    given = {**dict(zip(("input_ids", "generation_config"), args, strict=False)), **kwargs}
    if given.get("input_ids") is None and given.get("inputs") is not None:
        given["input_ids"] = given.pop("inputs")
    own = {name: given.pop(name) for name in (*AUXILIARY_KWARGS, "task_ids") if name in given}
    if given.get("input_ids") is None and (given.get("inputs_embeds") is None or model.config.is_encoder_decoder):
        raise ValueError("input_ids must be provided for Peft model generation")
    old = given.get("past_key_values")
    if old is not None and old.get_seq_length():
        raise ValueError("generate with a prompt cannot go on from `past_key_values`: pass the whole input.")
    for name in ("position_ids", "token_type_ids"):
        if given.pop(name, None) is not None:
            warn(f"`{name}` are not supported in generate with a prompt. Ignoring them.", 3)
    batch, settings = Batch(tuner, rows, given, own.get("task_ids")), _Settings(given, model)
    prompts = batch.prompts(batch.like(), decoder=model.config.is_encoder_decoder)
    if prompts.embeds is not None or not model.config.is_encoder_decoder:
        _give_mask(given, settings, batch)
    if prompts.pairs is not None:
        _give_cache(given, settings, batch, prompts)
    if model.config.is_encoder_decoder:
        if prompts.embeds is not None:
            if given.pop("encoder_outputs", None) is not None:
                warn("`encoder_outputs` should not be passed to `generate` when using prompt tuning. Ignoring it.", 3)
            batch.before_encoder(given, prompts)
    else:
        _before_decoder(given, settings, batch, prompts)
    defaults = {"generation_config": getattr(model, "generation_config", None)}
    with tuner._enable_peft_forward_hooks(**{**defaults, **given, **{n: own[n] for n in own if n in AUXILIARY_KWARGS}}):
        return model.generate(**given)


class _Settings:
    """Settings of `generate`: its arguments, then those of the generation's configuration, then the model's, which
    transformers takes for what that leaves open."""

    def __init__(self, given: dict[str, Any], model: Any) -> None:
        self.given, self.model, found = given, model, given.get("generation_config")
        self.config = model.generation_config if found is None else found

    def __getitem__(self, name: str) -> Any:
        choices = (getattr(config, name, None) for config in (self.config, self.model.generation_config))
        return next((value for value in (self.given.get(name), *choices) if value is not None), None)

    def take(self, name: str) -> Any:
        """A setting, which is then set no more."""
        found = self[name]
        self.given.pop(name, None)
        if getattr(self.config, name, None) is not None:
            self.config = self.given["generation_config"] = copy.deepcopy(self.config)
            setattr(self.config, name, None)
        return found


def _before_decoder(given: dict[str, Any], settings: _Settings, batch: Batch, prompts: Prompts) -> None:
    length = length_of(given)
    if prompts.embeds is not None:
        words = batch.words(dict(given))
        parts = [prompts.embeds.to(words.dtype), words]
        if prompts.pairs is not None:  # what is in the cache is counted along with the vectors
            parts.insert(0, words.new_zeros(batch.count, prompts.before, words.shape[-1]))
        given["inputs_embeds"] = torch.cat(parts, dim=1)
        # With vectors, lengths would be counted with them.
        before = length if given.get("input_ids") is not None else 0
        for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = settings.take(whole)
            if value is None or settings[new] is not None:
                continue
            if value > before:
                given[new] = value - before
            elif whole == "max_length":
                raise ValueError(
                    f"Input length of input_ids is {before}, but `max_length` is set to {value}. You should consider "
                    "increasing `max_length` or, better yet, setting `max_new_tokens`."
                )
    extend_mask(given, "attention_mask", prompts, batch.count, length)


def _give_cache(given: dict[str, Any], settings: _Settings, batch: Batch, prompts: Prompts) -> None:
    """A cache with the prefix, for as many rows as beams make of each."""
    model, is_pair = batch.model, batch.model.config.is_encoder_decoder
    if is_pair and prompts.mask is not None:
        ids = given.get("decoder_input_ids")
        batch.mask_prefix(given, prompts, 1 if ids is None else ids.shape[1])  # else of the token that starts
    each = repeats({"generation_config": None, **given}, model)
    again = prompts if each == 1 else batch.prompts(batch.like(), each, decoder=is_pair)
    assert again.pairs is not None
    into = given.get("past_key_values")
    if settings["cache_implementation"] is not None and settings.take("cache_implementation") == "static":
        from transformers import StaticCache

        tokens = 1 if is_pair else length_of(given)
        new = settings["max_new_tokens"] or max((settings["max_length"] or tokens + 20) - tokens, 1)
        text = model.config.get_text_config(decoder=True)
        into = StaticCache(config=text, max_cache_len=prompts.tokens + tokens + new)
    given["past_key_values"] = filled_cache(again.pairs, model, into)


def _give_mask(given: dict[str, Any], settings: _Settings, batch: Batch) -> None:
    """The mask that transformers takes where none is given: padding is what has the padding's token, unless that ends
    texts too."""
    if given.get("attention_mask") is not None:
        return
    ids: Tensor | None = given.get("input_ids")
    pad, ends = settings["pad_token_id"], settings["eos_token_id"]
    if ids is None or pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]) or pad not in ids:
        given["attention_mask"] = torch.ones(batch.count, length_of(given), dtype=torch.long, device=batch.device)
    else:
        given["attention_mask"] = (ids != pad).long()
