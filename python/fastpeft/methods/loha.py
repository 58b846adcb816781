"""LoHa (FedPara): the elementwise product of two low-rank products (arXiv 2108.06098).

W + alpha / r (w1_a w1_b) * (w2_a w2_b). A product of sums is the sum of the r^2 products: it is B A with the r^2
rows w1_b_i * w2_b_j in A and the r^2 columns w1_a_i * w2_a_j in B. While r^2 (in + out) < in out that costs less than a
weight, so it acts as a LoRA of rank r^2 does; else the weight is made a few rows at a time and never kept. Tucker
tensors t1 and t2 [r, r, *kernel] stand between the two factors of a convolution (Proposition 3 of the paper).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasInitWeights
from ..weights.base import widened
from .math.lycoris import Lycoris, LycorisConfig, effective, uniform
from .math.made_weight import weight_side
from .method import Inner, LayerInfo, State


@dataclass
class LoHaConfig(HasInitWeights, LycorisConfig, own_type="LOHA"):
    """See LycorisConfig."""


class LoHa(Lycoris, config=LoHaConfig):
    prefix = "hada_"
    tensors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    examples = (
        {"r": 2, "alpha": 3}, {"r": 6, "alpha": 5, "init_weights": False}, {"r": 3, "use_effective_conv2d": True},
    )  # fmt: skip

    def make_state(self, config: LoHaConfig, info: LayerInfo, shared: Any) -> State:
        r, (out, columns, *kernel) = config.r, info.shape
        tucker = effective(config, info)
        a, b = ((r, out), (r, columns)) if tucker else ((out, r), (r, columns * math.prod(kernel)))
        state = self.values(config)
        state |= {"hada_w1_a": uniform(*a), "hada_w1_b": uniform(*b), "hada_w2_a": uniform(*a)}
        state["hada_w2_b"] = nn.Parameter(torch.zeros(b)) if config.init_weights else uniform(*b)
        if tucker:
            sizes = (*kernel, 1)[:2]  # PEFT's tensors have two dimensions of the kernel even where it has one
            state |= {"hada_t1": uniform(r, r, *sizes), "hada_t2": uniform(r, r, *sizes)}
        return state

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        w1a, w1b, w2a, w2b = (widened(t) for t in (s.hada_w1_a, s.hada_w1_b, s.hada_w2_a, s.hada_w2_b))
        if s.get("hada_t1") is None:
            first, second = w1a @ w1b, w2a @ w2b
        else:
            first = torch.einsum("ijkl,jc,io->ockl", widened(s.hada_t1), w1b, w1a)
            second = torch.einsum("ijkl,jc,io->ockl", widened(s.hada_t2), w2b, w2a)
        return first * second * s.scaling  # type: ignore[no-any-return]

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor] | None:
        w1a, w1b, w2a, w2b = s.hada_w1_a, s.hada_w1_b, s.hada_w2_a, s.hada_w2_b
        (out, r), columns = w1a.shape, w1b.shape[1]
        if s.get("hada_t1") is not None or r * r * (out + columns) >= out * columns:
            return None
        return (w1b[:, None] * w2b).flatten(0, 1), (w1a[:, :, None] * (w2a * s.scaling)[:, None]).flatten(1)

    def is_cheap(self, s: Any, info: LayerInfo) -> bool:
        (out, r), columns = s.hada_w1_a.shape, s.hada_w1_b.shape[1]
        return info.groups == 1 and s.get("hada_t1") is None and 4 * r * r * (out + columns) < out * columns

    def added(self, s: Any, x: Tensor, inner: Inner) -> Tensor:
        info, found = inner.info, self.factors(s, s, None)
        x = s.cast(x, s.hada_w1_a.dtype)
        if found is None and info.kind == "linear":
            scale: float = s.scaling

            def rows(_: None, i: int, j: int, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
                return (w1a[i:j] @ w1b) * (w2a[i:j] @ w2b) * scale

            params = s.hada_w1_a, s.hada_w1_b, s.hada_w2_a, s.hada_w2_b
            return weight_side(x, info.out_features, lambda: None, rows, *params)
        if found is None or info.groups > 1:
            return super().added(s, x, inner)
        channel = 1 - len(info.shape)  # the last dimension in a linear layer, the one before its sizes in a convolution
        z = inner.apply(x, found[0].reshape(-1, *info.shape[1:]))
        return F.linear(z.movedim(channel, -1), found[1]).movedim(-1, channel)
