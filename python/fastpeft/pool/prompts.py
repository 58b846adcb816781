"""Prompts in a pool: adapters that are keys and values before those of a request, in every layer.

A file holds either those, or vectors before the input, whose keys and values the base model computes once. A prompt
takes a slot, in which no layer has an adapter, and as many of the pool's virtual tokens as it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config.base import PeftConfig, class_of
from ..config.types import PeftType, TaskType
from ..files.checks import TUNER, AdapterFileError
from ..inject.modules import input_embeddings
from ..methods.registry import method_of
from ..prompts.cache import LAYERS_DIFFER, computed_pairs, key_values
from ..prompts.encoder import ENCODER
from ..prompts.method import PromptMethod
from ..prompts.sizes import key_value_sizes
from ..saving.fits import check_shapes
from ..saving.folder import AdapterSource

_SIZES = ("num_layers", "num_attention_heads", "token_dim")


@dataclass(eq=False)
class Prompt:
    """A prompt of `tokens` virtual tokens. vectors [tokens, width]: before the input, until their keys and values are
    known. pairs [layers, 2, heads, tokens, width of a head]: those, in the model's dtype."""

    tokens: int
    vectors: Tensor | None = None
    pairs: Tensor | None = None

    def key_values(self, model: Any) -> Tensor:
        """`pairs`, on the model's device. Called by the thread that runs the model, which computes as the base."""
        if self.vectors is not None:
            self.pairs, self.vectors = computed_pairs(model, self.vectors.to(model.device)), None
        assert self.pairs is not None
        self.pairs = self.pairs.to(model.device)
        return self.pairs


def is_prompt(content: Mapping[str, Any]) -> bool:
    """True for the configuration of a prompt, as a file has it."""
    named = str(content.get("peft_type")).upper()
    return named in PeftType.__members__ and bool(class_of(named).is_prompt_learning)


def prompt_config(content: Mapping[str, Any]) -> Any:
    """The configuration of a folder, which must be a prompt that its file says in full: else ValueError."""
    config: Any = PeftConfig.from_peft_type(**{k: v for k, v in content.items() if k != "runtime_config"})
    method = method_of(config)
    method.check_config(config, loading=True)
    task = None if config.task_type is None else TaskType(config.task_type)
    refused = {
        f"it is for the task {task and task.value}, not CAUSAL_LM": task not in (None, TaskType.CAUSAL_LM),
        "it is for an encoder and a decoder": config.num_transformer_submodules == 2,
        "it trains modules of the model beside the prompt": bool(config.modules_to_save),
        "it has several tasks, and a request names none": getattr(config, "num_tasks", 1) != 1,
    }
    for rule, holds in refused.items():
        if holds:
            raise AdapterFileError(f"a pool serves prompts of causal language models that a file says in full: {rule}",
                                   rule)  # fmt: skip
    return config


class Prompts:
    """Reads prompts for a model. most: the virtual tokens that one may have; 0 where none are served."""

    def __init__(self, model: Any, most: int) -> None:
        self.model, self.most = model, most

    def read(self, source: AdapterSource) -> Prompt:
        """Read a prompt into CPU memory. Its configuration, names and shapes are checked before a tensor is read, then
        the values. Raises ValueError."""
        config = prompt_config(source.config)
        method = method_of(config)
        assert isinstance(method, PromptMethod)
        self._check(config, method)
        vars(config).update(method.open_fields(config, self.model, None))
        words: Any = input_embeddings(self.model)
        with torch.device("meta"):
            encoder: Any = method.make_encoder(config, self.model, words, loading=True)
        mark = f"{TUNER}{ENCODER}."
        packed = method.pack(config, {mark + name: t for name, t in encoder.state_dict().items()})
        check_shapes({key: tuple(t.shape) for key, t in packed.items()}, source.tensors, source.folder)
        state = {key.removeprefix(mark): t.float() for key, t in method.unpack(config, source.read()).items()}
        encoder.load_state_dict(state, assign=True)
        like = _dtype(self.model)
        with torch.no_grad():
            found = encoder.prompt(torch.zeros(1, dtype=torch.int64) if method.takes_tasks else None)
            found = (found[0] if method.takes_tasks else found).to(like)
        if not torch.isfinite(found).all():
            rule = f"a value is beyond the range of {like}, the model's dtype"
            raise AdapterFileError(rule, rule)
        tokens = int(config.num_virtual_tokens)
        if not method.in_cache:
            return Prompt(tokens, vectors=found.clone())
        pairs = key_values(found, config.num_layers, config.num_attention_heads, decoder=False)
        return Prompt(tokens, pairs=pairs.contiguous())

    def _check(self, config: Any, method: PromptMethod) -> None:
        for name in ("num_virtual_tokens", "num_ranks"):
            value = getattr(config, name, None) or 0
            if value > self.most:
                why = f"above the pool's max_virtual_tokens={self.most}"
                raise AdapterFileError(f"its {name} {value} is {why}", f"its {name} is {why}")
        text: Any = self.model.config.get_text_config()
        if any(name in str(getattr(text, "model_type", "")) for name in LAYERS_DIFFER):
            rule = f"prompts are not served on {text.model_type}, whose layers have different keys and values"
            raise AdapterFileError(rule, rule)
        if method.in_cache:
            own = key_value_sizes(self.model)
            found = {name: getattr(config, name) for name in _SIZES if getattr(config, name) is not None}
            if any(value != own[name] for name, value in found.items()):
                rule = "its keys and values are of another model's layers, heads or widths"
                raise AdapterFileError(f"{rule}: {found}, expected {own}", rule)


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token in all layers. Raises ValueError for a model that does not say them."""
    own = key_value_sizes(model)
    return 2 * own["num_layers"] * own["token_dim"] * _dtype(model).itemsize


def _dtype(model: Any) -> torch.dtype:
    """The dtype of a model's activations, as its input embeddings have it."""
    words: Any = input_embeddings(model)
    quantised = getattr(words, "out_dtype", None)  # of a `QuantEmbedding`, which has no floats
    found: torch.dtype = quantised or next(p.dtype for p in words.parameters() if p.is_floating_point())
    return found
