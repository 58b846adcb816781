"""LoKr: W + alpha / r kron(w1, w2), either factor of low rank or whole (LyCORIS, arXiv 2309.14859).

With x as a matrix [c, d], kron(w1, w2) x is w1 x w2^T: about in (b + a) products per token in place of in out, and few
more than a LoRA where w2 = w2_a w2_b, whose Tucker core in a convolution is t2 [r, r, *kernel]. A convolution takes the
weight as a whole: in groups of channels that share w2 it has fewer products and takes longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import check, check_choice
from ..weights.base import widened
from .math.lycoris import Lycoris, LycorisConfig, effective, uniform
from .method import Inner, LayerInfo, State


@dataclass
class LoKrConfig(LycorisConfig, own_type="LOKR"):
    """See LycorisConfig. decompose_both: w1 may be of low rank as well. decompose_factor: the size of w1, or the
    largest divisor up to it; -1: the divisor nearest to the root. rank_dropout_scale: rank_dropout keeps the mean.
    init_weights: also "lycoris", which starts with w2 at zero in place of w1."""

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers with this product; the first is `factor` if it divides, else the largest divisor up to it and up to
    the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(m for m in range(max(most, 1), 0, -1) if size % m == 0)
    return first, size // first


class LoKr(Lycoris, config=LoKrConfig):
    tensors = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    examples = (
        {"r": 1, "alpha": 3}, {"r": 1, "use_effective_conv2d": True, "decompose_factor": 2},
        {"r": 8, "alpha": 5, "init_weights": False, "decompose_factor": 4},
        {"r": 1, "decompose_both": True, "decompose_factor": 3, "init_weights": "lycoris"},
    )  # fmt: skip

    def check_config(self, config: LoKrConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        factor = config.decompose_factor
        check(config, "decompose_factor", factor == -1 or factor >= 1, "-1 or positive")
        check_choice(config, "init_weights", True, False, "lycoris")

    def make_state(self, config: LoKrConfig, info: LayerInfo, shared: Any) -> State:
        r, (out, columns, *kernel) = config.r, info.shape
        (a, b), (c, d) = factorize(out, config.decompose_factor), factorize(columns, config.decompose_factor)
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b")}.get(config.init_weights, ())
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (a, c)}
        if config.decompose_both and r < max(a, c) / 2:
            shapes = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        if r >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *kernel)
        elif effective(config, info):
            shapes |= {"lokr_w2_a": (r, b), "lokr_w2_b": (r, d), "lokr_t2": (r, r, *(*kernel, 1)[:2])}
        else:
            shapes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * math.prod(kernel))}
        made = {n: nn.Parameter(torch.zeros(shape)) if n in zero else uniform(*shape) for n, shape in shapes.items()}
        return {**self.values(config), "rank_dropout_scale": config.rank_dropout_scale, **made}

    def _left(self, s: Any) -> Tensor:
        """w1 with the scaling, [a, c]."""
        w1 = s.get("lokr_w1")
        return (s.lokr_w1_a @ s.lokr_w1_b if w1 is None else w1) * s.scaling  # type: ignore[no-any-return]

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        w1, w2 = widened(self._left(s)), s.get("lokr_w2")  # [b, d, *kernel], or [b, d * kernel] as a matrix
        if s.get("lokr_t2") is not None:
            w2 = torch.einsum("ijkl,ib,jd->bdkl", s.lokr_t2, s.lokr_w2_a, s.lokr_w2_b)
        w2 = widened(s.lokr_w2_a @ s.lokr_w2_b if w2 is None else w2)
        if w2.dim() == 3:
            # [b, d, k], which torch.kron takes w1 as [1, a, c] for. Not the Kronecker product that was meant, but what
            # PEFT trains in nn.Conv1d, so what its files mean.
            return torch.kron(w1, w2.contiguous())
        return (w1[:, None, :, None] * w2.flatten(1)[:, None]).flatten(0, 1).flatten(1)

    def added(self, s: Any, x: Tensor, inner: Inner) -> Tensor:
        if inner.info.kind != "linear":
            return super().added(s, x, inner)
        w1 = self._left(s)
        (a, c), x = w1.shape, s.cast(x, w1.dtype)
        x = x.reshape(*x.shape[:-1], c, -1)
        if s.get("lokr_w2") is None:
            return F.linear(w1 @ F.linear(x, s.lokr_w2_b), s.lokr_w2_a).flatten(-2)
        b, d = s.lokr_w2.shape
        if c * b * (d + a) < a * d * (c + b):
            return (w1 @ F.linear(x, s.lokr_w2)).flatten(-2)
        return F.linear(w1 @ x, s.lokr_w2).flatten(-2)
