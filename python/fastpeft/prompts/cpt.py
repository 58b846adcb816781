"""CPT, context-aware prompt tuning: examples before the input, whose embeddings training may move a little
(arXiv 2410.17222)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import PromptLearningConfig
from ..config.types import TaskType
from .encoder import PROMPT, BasePromptEncoder, rows_of
from .method import PromptMethod


@dataclass
class CPTConfig(PromptLearningConfig, own_type="CPT"):
    """cpt_token_ids: the examples. cpt_tokens_type_mask: what each token is, four numbers for each example: modulo 4, 1
    and 3 are the template around input and output, 2 the input and 0 the output, which stays and whose loss counts.
    cpt_mask: PEFT's; nothing reads it. opt_weighted_loss_type: "none", or "decay": each example counts
    `opt_loss_decay_factor` times the one after it. opt_projection_epsilon, opt_projection_format_epsilon: how far an
    input's and a template's embedding may move, in a model that is 2048 wide.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"{type(self).__name__} only supports task_type = {TaskType.CAUSAL_LM.value}.")
        ids = self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = len(ids)
        self.cpt_mask = [1] * len(ids) if self.cpt_mask is None else self.cpt_mask
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * len(ids)
        if not len(ids) == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ValueError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")


class CPTEmbedding(BasePromptEncoder):
    """The embeddings of the examples [tokens, token_dim] and what is added to them, of bounded norm."""

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        shape = (config.num_virtual_tokens, config.token_dim)
        self.embedding = nn.Embedding(*shape)
        if not config.inference_mode and word_embeddings is not None and not self.embedding.weight.is_meta:
            self.embedding.weight = nn.Parameter(rows_of(word_embeddings, torch.tensor(config.cpt_token_ids)))
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(*shape, _weight=torch.zeros(shape))

    def trained(self) -> list[nn.Parameter]:
        return list(self.delta_embedding.parameters())

    def get_epsilon(self) -> Tensor:
        """How far each token's embedding may move [tokens]."""
        return _bounds(self.config, self.delta_embedding.weight)

    def get_projection(self) -> Tensor:
        """The addition to the embeddings, with norms of at most `get_epsilon` [tokens, token_dim]."""
        return _bounded(self.config, self.delta_embedding.weight)

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        self.delta_embedding.weight.data = self.get_projection()
        delta = self.delta_embedding.weight
        moves = (_types(self.config, delta) % 4 != 0)[:, None]  # no gradient reaches the others
        found: Tensor = self.embedding.weight.detach() + torch.where(moves, delta, delta.detach())
        return found

    @staticmethod
    def calculate_loss(base_model_output: Any, labels: Tensor, cpt_type_mask: Tensor, config: Any) -> Any:
        """The output with the loss of CPT: the mean over labels that are not -100, [rows, tokens], each weighted by its
        example; cpt_type_mask [rows, tokens] says which that is."""
        logits = base_model_output.logits
        labels, types = labels[:, 1:].to(logits.device), cpt_type_mask[:, 1:].to(logits.device)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        weights = torch.ones_like(loss)
        if config.opt_weighted_loss_type == "decay":
            for row, of_row in enumerate(types):
                outputs = of_row[(of_row > 0) & (of_row % 4 == 0)].unique()
                for age, example in enumerate(reversed(outputs.tolist())):
                    weights[row][of_row == example] = config.opt_loss_decay_factor**age
        counted = labels != -100
        base_model_output.loss = (loss[counted] * weights[counted]).mean()
        return base_model_output


def _types(config: Any, like: Tensor) -> Tensor:
    return torch.tensor(config.cpt_tokens_type_mask, device=like.device)


def _bounds(config: Any, delta: Tensor) -> Tensor:
    types, scale = _types(config, delta), (delta.shape[1] / 2048) ** 0.5
    found = torch.full(types.shape, 1e-10, device=types.device)
    found = found.masked_fill((types > 0) & (types % 2 == 1), config.opt_projection_format_epsilon * scale)
    return found.masked_fill((types > 0) & (types % 4 == 2), config.opt_projection_epsilon * scale)


def _bounded(config: Any, delta: Tensor) -> Tensor:
    """The rows of a matrix, shortened to norms of at most `_bounds`."""
    with torch.no_grad():
        norms, most = delta.norm(dim=1), _bounds(config, delta).to(delta.dtype)
        return torch.where((norms > 0)[:, None], delta * (most / norms.clamp(min=most))[:, None], delta)


class CPT(PromptMethod, config=CPTConfig):
    encoder_class = CPTEmbedding
    needs_words = True

    def make_encoder(self, config: Any, model: nn.Module, words: Any, loading: bool = False) -> nn.Module:
        if words is not None and not all(0 <= token < words.weight.shape[0] for token in config.cpt_token_ids):
            raise ValueError(f"`cpt_token_ids` should be tokens of the model, from 0 to {words.weight.shape[0] - 1}")
        return super().make_encoder(config, model, words, loading)

    def to_file(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {PROMPT: tensors["embedding.weight"] + _bounded(config, tensors["delta_embedding.weight"])}

    def from_file(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().from_file(config, tensors)
        if PROMPT in tensors:
            found["delta_embedding.weight"] = torch.zeros_like(tensors[PROMPT])
        return found
