"""A module that makes a prompt, with its trained tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ENCODER = "prompt_encoder"  # the name of the encoders' container
PROMPT = "prompt_embeddings"  # of the prompt, in files


class BasePromptEncoder(nn.Module):
    """Makes a prompt [tokens, width]: `prompt()` gives it, `forward(indices)` [..., n] gives rows of it."""

    embedding: Any

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        """The prompt [tokens, width], or one for each task of `task_ids` [tasks, tokens, width]."""
        found: Tensor = self.embedding.weight
        return found

    def forward(self, indices: Tensor) -> Tensor:
        return self.prompt()[indices]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return list(self.parameters())

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take over a prompt [tokens, width]. Raises ValueError for another shape."""
        target = self.embedding.weight
        if prompt_embeddings.shape != target.shape:
            raise ValueError(
                f"Invalid `prompt_embeddings` shape. Expected {tuple(target.shape)}, got "
                f"{tuple(prompt_embeddings.shape)}."
            )
        with torch.no_grad():
            self._fill(prompt_embeddings)

    def _fill(self, prompt_embeddings: Tensor) -> None:
        self.embedding.weight.copy_(prompt_embeddings)


def first_tokens(ids: Sequence[int], count: int) -> list[int]:
    """`count` of the tokens, which are repeated where there are fewer."""
    if not ids:
        raise ValueError("`prompt_tuning_init_text` has no tokens to start a prompt from")
    return [ids[i % len(ids)] for i in range(count)]


def rows_of(words: Any, ids: Tensor) -> Tensor:
    """The input embeddings of tokens, as float32 that belongs to nobody."""
    with torch.no_grad():
        found: Tensor = words(ids.to(words.weight.device))
        return found.detach().clone().to(torch.float32)


def size_of(words: Any) -> tuple[int, int]:
    """(tokens, width) of input embeddings; those of a quantised table are not its tensor's."""
    tokens, width = words.quant_weight().shape if hasattr(words, "quant_weight") else words.weight.shape
    return tokens, width
