"""Cartridge: a trained cache of keys and values, the first of them frozen (arXiv 2506.06266)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..config.base import PromptLearningConfig
from .encoder import PROMPT, BasePromptEncoder
from .method import PromptMethod


@dataclass
class CartridgeConfig(PromptLearningConfig, own_type="CARTRIDGE"):
    """num_frozen_tokens: how many of the first tokens are not trained; models use the first as a sink of attention.

    It starts at random; `initialize_kv_prefix_from_text` and `initialize_kv_prefix_from_past_key_values` fill it."""

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens < 0:
            raise ValueError(f"`num_frozen_tokens` must be >= 0, got {self.num_frozen_tokens}.")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                "`num_frozen_tokens` must be <= `num_virtual_tokens`, got "
                f"num_frozen_tokens={self.num_frozen_tokens} and num_virtual_tokens={self.num_virtual_tokens}."
            )


class CartridgeEncoder(BasePromptEncoder):
    """The prefix [tokens, layers * 2 * token_dim] in two parameters, the frozen tokens and the trained ones."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        tokens, wide = config.num_virtual_tokens, config.num_layers * 2 * config.token_dim
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = tokens - self.num_frozen_tokens
        frozen = torch.empty(self.num_frozen_tokens, wide)
        self.frozen_embedding = nn.Parameter(frozen, requires_grad=False) if self.num_frozen_tokens else None
        trained = torch.empty(self.num_trainable_tokens, wide)
        self.trainable_embedding = nn.Parameter(trained, requires_grad=not config.inference_mode)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    @property
    def weight(self) -> Tensor:
        """The whole prefix [tokens, layers * 2 * token_dim]."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """The prefix as other encoders hold theirs, `embedding.weight`."""
        return SimpleNamespace(weight=self.weight)

    def trained(self) -> list[nn.Parameter]:
        return [self.trainable_embedding]

    def forward(self, indices: Tensor) -> Tensor:
        return self.weight.expand(indices.shape[0], -1, -1)

    def _fill(self, prompt_embeddings: Tensor) -> None:
        if self.frozen_embedding is not None:
            self.frozen_embedding.copy_(prompt_embeddings[: self.num_frozen_tokens])
        self.trainable_embedding.copy_(prompt_embeddings[self.num_frozen_tokens :])


class Cartridge(PromptMethod, config=CartridgeConfig):
    encoder_class = CartridgeEncoder
    in_cache = True

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        frozen = config.num_frozen_tokens
        if type(frozen) is not int or not 0 <= frozen <= config.num_virtual_tokens:
            raise ValueError(f"`num_frozen_tokens` must be in [0, num_virtual_tokens], got {frozen!r}.")

    def to_file(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = [tensors[n] for n in ("frozen_embedding", "trainable_embedding") if n in tensors]
        return {PROMPT: torch.cat(parts)}

    def from_file(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(tensors)
        if (prompt := found.pop(PROMPT, None)) is not None:
            frozen = config.num_frozen_tokens
            found |= {"frozen_embedding": prompt[:frozen]} if frozen else {}
            found["trainable_embedding"] = prompt[frozen:]
        return found
