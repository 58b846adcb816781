"""The next token of each request of a batch, with its own temperature, nucleus and random numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sampling:
    """temperature 0: the likeliest token. top_p: of the tokens, likeliest first, those are drawn from whose
    predecessors' probabilities sum to less. seed: of this request's random numbers, which no other request changes."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def uniform(self) -> float:
        """The next random number in [0, 1); only requests that sample use one up."""
        return self._random.random() if self.temperature > 0 else 0.0


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Tokens, int64 [n], from logits float32 [n, vocabulary] and one float32 each, [n].

    On a GPU all rows take the same way, without a look at their values (CUDA graphs); on a CPU only rows that sample
    are exponentiated, and only those with top_p < 1 sorted.
    """
    best = logits.argmax(-1)
    if logits.is_cuda:
        return torch.where(temperature > 0, _sample(logits, temperature.clamp_min(1e-6), top_p, uniform, True), best)
    for nucleus in (False, True):
        rows = ((temperature > 0) & ((top_p < 1) == nucleus)).nonzero().flatten()
        if rows.numel():
            best[rows] = _sample(logits[rows], temperature[rows], top_p[rows], uniform[rows], nucleus)
    return best


def _sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, nucleus: bool) -> Tensor:
    p = torch.softmax(logits / temperature.unsqueeze(-1), dim=-1)
    order = None
    if nucleus:
        p, order = p.sort(dim=-1, descending=True)
        p = p.where(p.cumsum(-1) - p < top_p.unsqueeze(-1), 0.0)
        p[..., 0].clamp_min_(1e-20)  # top_p 0 leaves the likeliest
    total = p.cumsum(-1)
    last = total[:, -1:]
    # below the last sum, so that the first place that exceeds it has a probability of its own
    at = torch.minimum(uniform.unsqueeze(-1) * last, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(total, at, right=True)
    return (place if order is None else order.gather(-1, place)).squeeze(-1)


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The natural logarithms, float32 [n], of the tokens' probabilities by the model, at temperature 1."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)
