"""The next token of each request of a batch, with its own temperature, nucleus and random numbers.

Nothing here raises for what is in a row, and no row sees another. A row without a distribution (NaN, an infinite logit)
gets some token of the vocabulary and a `logprobs` that is not finite, which is how its request is told from the others.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Below it, temperatures are subnormal: arithmetic may round them to 0, and any difference of logits over them is
# infinite or 0. They mean the likeliest token, as 0 does.
COLDEST = torch.finfo(torch.float32).tiny


@dataclass
class Sampling:
    """temperature 0, or below `COLDEST`: the likeliest token. top_p: of the tokens, likeliest first, those are drawn
    from whose predecessors' probabilities sum to less. seed: of this request's random numbers, which no other request
    changes."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def uniform(self) -> float:
        """The next random number in [0, 1); only requests that sample use one up."""
        return self._random.random() if self.temperature > 0 else 0.0


def draw(
    logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, one_way: bool | None = None
) -> Tensor:
    """Tokens, int64 [n], from logits float32 [n, vocabulary] and one float32 each, [n].

    one_way: all rows take the same way, without a look at their values (CUDA graphs); by default on a GPU. On a CPU
    only rows that sample are exponentiated, and only those with top_p < 1 sorted.
    """
    best = logits.argmax(-1, keepdim=True)
    warm = temperature >= COLDEST
    if logits.is_cuda if one_way is None else one_way:
        tokens = _sample(logits - logits.gather(-1, best), temperature.clamp_min(COLDEST), top_p, uniform, True)
        return torch.where(warm, tokens, best.squeeze(-1))
    for nucleus in (False, True):
        rows = (warm & ((top_p < 1) == nucleus)).nonzero().flatten()
        if rows.numel():
            below = logits[rows]
            below -= below.gather(-1, best[rows])
            best[rows, 0] = _sample(below, temperature[rows], top_p[rows], uniform[rows], nucleus)
    return best.squeeze(-1)


def _sample(below: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, nucleus: bool) -> Tensor:
    """below: logits less the largest of their row, so that what overflows when divided is -inf, of probability 0."""
    p = torch.softmax(below / temperature.unsqueeze(-1), dim=-1)
    order = None
    if nucleus:
        p, order = p.sort(dim=-1, descending=True)
        p = p.where(p.cumsum(-1) - p < top_p.unsqueeze(-1), 0.0)
        p[..., 0].clamp_min_(1e-20)  # top_p 0 leaves the likeliest
    total = p.cumsum(-1)
    last = total[:, -1:]
    # below the last sum, so that the first place that exceeds it has a probability of its own
    at = torch.minimum(uniform.unsqueeze(-1) * last, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(total, at, right=True).clamp_max_(total.shape[-1] - 1)  # behind the end of NaN sums
    return (place if order is None else order.gather(-1, place)).squeeze(-1)


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The natural logarithms, float32 [n], of the tokens' probabilities by the model, at temperature 1.

    NaN or infinite exactly where the row has no distribution: a logit is NaN or inf, or all are -inf.
    """
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)
