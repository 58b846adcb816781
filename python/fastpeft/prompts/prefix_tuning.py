"""Prefix tuning: trained keys and values before those of the input, in every layer (arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config.base import PromptLearningConfig
from .encoder import BasePromptEncoder
from .method import PromptMethod


@dataclass
class PrefixTuningConfig(PromptLearningConfig, own_type="PREFIX_TUNING"):
    """init_weights: None for random numbers, "zero" for zeros. prefix_projection: let two layers make the prefix in
    training, encoder_hidden_size wide (None: token_dim)."""

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


class PrefixEncoder(BasePromptEncoder):
    """The prefix [tokens, layers * 2 * token_dim], or an embedding [tokens, token_dim] and what makes it of that."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.prefix_projection = config.prefix_projection
        tokens, width, wide = config.num_virtual_tokens, config.token_dim, config.num_layers * 2 * config.token_dim
        projects = config.prefix_projection and not config.inference_mode
        self.embedding = nn.Embedding(tokens, width if projects else wide)
        last = self.embedding
        if projects:
            hidden = config.encoder_hidden_size
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, wide))
            last = self.transform[-1]
        if config.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        weight: Tensor = self.embedding.weight
        return self.transform(weight) if "transform" in self._modules else weight

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        if "transform" in self._modules:
            raise ValueError("Cannot load flattened prompt embeddings when `prefix_projection=True`.")
        super().load_prompt_embeddings(prompt_embeddings)

    def drop_network(self) -> None:
        """Make room for the prefix itself, in place of what makes it."""
        if (network := self._modules.pop("transform", None)) is not None:
            like = network[-1].weight  # type: ignore[index]
            made = nn.Embedding(self.embedding.num_embeddings, like.shape[0], device=like.device, dtype=like.dtype)
            self.embedding = made.requires_grad_(like.requires_grad)


class PrefixTuning(PromptMethod, config=PrefixTuningConfig):
    encoder_class = PrefixEncoder
    in_cache = True

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.init_weights not in (None, "zero"):
            raise ValueError(f"`init_weights` should be None or 'zero', got {config.init_weights!r}")
