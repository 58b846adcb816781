"""Losses of a shadow's head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loss_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [batch, tokens, vocabulary] and the next tokens' labels; -100 is passed over."""
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100)


def loss_of_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of logits [batch, labels] as transformers chooses it: of a regression for one label, of a class for whole
    numbers, else of several labels at once."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1))
    if labels.dtype in (torch.long, torch.int):
        return F.cross_entropy(logits.flatten(0, -2), labels.long().flatten())
    return F.binary_cross_entropy_with_logits(logits, labels)


def of_last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The states [batch, width] of the last tokens that are no padding, which may be on either side."""
    if attention_mask is None:
        return hidden[:, -1]
    places = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    last = (attention_mask.ne(0) * places).argmax(dim=-1).to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
