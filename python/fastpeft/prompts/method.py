"""PromptMethod: the method of a prompt, which makes, loads and saves its encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..files.checks import PREFIX, TUNER
from ..methods.method import Method
from .batch import prompts_of
from .cache import filled_cache
from .encoder import ENCODER, PROMPT, size_of
from .sizes import check_sizes, completed


def get_prompt(tuner: Any, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
    """The active prompt for the rows of a batch: vectors [rows, tokens, width], or a cache that starts with it."""
    rows, like = tuner.prompt_encoder.active_adapters * batch_size, next(tuner.model.parameters())
    decoder = bool(getattr(tuner.model.config, "is_encoder_decoder", False))
    found = prompts_of(tuner.prompts(), rows, task_ids, like, decoder)
    return found.embeds if found.pairs is None else filled_cache(found.pairs, tuner.model)


def get_prompt_embedding_to_save(tuner: Any, adapter_name: str) -> Tensor:
    """The tensor that a file has of an adapter's prompt [tokens, width]."""
    method, encoder, config = tuner.prompts()[adapter_name]
    found: Tensor = method.to_file(config, encoder.state_dict())[PROMPT].detach().cpu()
    return found


class PromptMethod(Method):
    """A method whose adapter is a prompt: no layer of the model changes.

    encoder_class: makes the prompt. in_cache: it is keys and values of all layers, else vectors before the input.
    needs_words: the encoder starts from the model's input embeddings. takes_tasks: its rows have `task_ids`.
    """

    prompts = True
    encoder_class: ClassVar[type[Any]]
    in_cache: ClassVar[bool] = False
    needs_words: ClassVar[bool] = False
    takes_tasks: ClassVar[bool] = False
    kinds = frozenset()
    mergeable = False
    autocast = False
    model_methods: ClassVar[Mapping[str, Any]] = {
        "get_prompt": get_prompt, "get_prompt_embedding_to_save": get_prompt_embedding_to_save,
    }  # fmt: skip

    def __init_subclass__(cls, config: type[Any] | None = None) -> None:
        super().__init_subclass__(config)
        cls.model_name = "BaseTuner"

    @property
    def hooks_model(self) -> bool:
        return True

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        check_sizes(config)

    def open_fields(self, config: Any, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        return completed(config, model, self.in_cache)

    def make_encoder(self, config: Any, model: nn.Module, words: Any, loading: bool = False) -> nn.Module:
        """The encoder of a complete configuration. loading: a file's prompt will be in it, whatever it was made by.

        Raises ValueError where the model cannot take the prompt."""
        if self.in_cache:
            if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                raise ValueError(
                    f"{self.peft_type.value} does not work with gradient checkpointing: layers that are computed again "
                    "have no cache, which holds the prefix. Turn it off, or use prompt tuning or P-tuning."
                )
        elif words is None:
            raise ValueError(f"{type(model).__name__} has no input embeddings, before which {self.peft_type.value} "
                             "puts its prompt.")  # fmt: skip
        elif words.weight.numel() and (width := size_of(words)[1]) != config.token_dim:
            raise ValueError(f"`token_dim` should be the width of the input embeddings, {width}, got "
                             f"{config.token_dim}.")  # fmt: skip
        made = copy.copy(config)
        made.inference_mode = config.inference_mode or loading
        return self._made(made, words)

    def _made(self, config: Any, words: Any) -> nn.Module:
        made: nn.Module = self.encoder_class(config, words) if self.needs_words else self.encoder_class(config)
        return made

    # Files: PEFT's keys name the base model's modules below `base_model.`, and the prompt is a tensor of its own.

    def base_key(self, key: str) -> str:
        return TUNER + key.removeprefix(PREFIX) if key.startswith(PREFIX) else key

    def pack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mark = f"{ENCODER}."
        held = {key.rpartition(mark)[2]: t for key, t in tensors.items() if mark in f".{key}"}
        return self.to_file(config, held) | {self.base_key(k): t for k, t in tensors.items() if mark not in f".{k}"}

    def unpack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {key: t for key, t in tensors.items() if not key.startswith(TUNER)}
        found = {f"{TUNER}{ENCODER}.{name}": t for name, t in self.from_file(config, own).items()}
        return found | {PREFIX + k.removeprefix(TUNER): t for k, t in tensors.items() if k not in own}

    def to_file(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors for those of the encoder, by their names in it."""
        if [*tensors] == ["embedding.weight"]:
            return {PROMPT: tensors["embedding.weight"]}
        trained = copy.copy(config)
        trained.inference_mode = False
        with torch.device("meta"):
            encoder = self._made(trained, None)
        encoder.load_state_dict(tensors, assign=True)
        with torch.no_grad():
            return {PROMPT: encoder.eval().prompt()}  # type: ignore[operator]

    def from_file(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's tensors for those of a file; what is none of them keeps its name."""
        return {"embedding.weight" if name == PROMPT else name: t for name, t in tensors.items()}
