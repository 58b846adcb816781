"""MiSS (and its variant Bat): one block of rows repeated along the input (arXiv 2409.15371).

The input's features are summed in r groups, feature i into group i mod r, and the sums go through D [r, out_features],
or with "mini" through D [r, mini_r] repeated along the output: one thin product. With "bat" each block of W [r, r] gets
W_pq B_p + B_p, where B_p belongs to a row of blocks. That reads all of W, so it is made on the weight side
(`made_weight.py`): (3 T + 3 r) / (2 T) of the frozen layer's FLOPs at T tokens, 1.69 with r = 64 and T = 512.
Fewer tokens than r, in evaluation, have it on their activations: 2 T products of W with a vector in place of T + r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasBias, TargetConfig
from ..weights.base import widened
from .math.draws import kaiming_
from .math.factored import FactoredMethod, dropout, is_thin, plus_product
from .math.made_weight import weight_side
from .method import Inner, LayerInfo, Method, State


@dataclass
class MissConfig(HasBias, TargetConfig, own_type="MISS"):
    """r: groups of the input. miss_dropout: of the input. mini_r: groups of the output, of "mini" alone. init_weights:
    True, "bat" or "mini" for the forms above, which start at zero; False for the first, at random."""

    choices: ClassVar[Any] = {"init_weights": (True, False, "bat", "mini")}

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True


class Miss(FactoredMethod, config=MissConfig):
    tensors = ("miss_block",)
    dropout = "miss_dropout"
    counts = ("r", "mini_r")
    examples = (
        {"r": 4}, {"r": 7, "init_weights": False}, {"r": 4, "init_weights": "bat"},
        {"r": 5, "init_weights": "mini", "mini_r": 4},
    )  # fmt: skip

    def variant(self, config: MissConfig) -> Method:
        return _BAT if config.init_weights == "bat" else self

    def check_layer(self, config: MissConfig, info: LayerInfo) -> None:
        if config.r > info.in_features:
            limit = f"less than or equal to in_features ({info.in_features})"
            raise ValueError(f"`r` ({config.r}) must be {limit} in {info.name!r}")
        super().check_layer(config, info)
        if config.init_weights == "mini" and info.out_features % config.mini_r:
            raise ValueError(f"out_features ({info.out_features}) of {info.name!r} must be divisible by `mini_r`")

    def make_state(self, config: MissConfig, info: LayerInfo, shared: Any) -> State:
        block = torch.zeros(self._shape(config, info))
        if not config.init_weights:
            kaiming_(block)
        return {
            "miss_r": config.r, "miss_dropout": dropout(config.miss_dropout), "miss_mini_r": config.mini_r,
            "miss_block": nn.Parameter(block),
        }  # fmt: skip

    def _shape(self, config: MissConfig, info: LayerInfo) -> tuple[int, ...]:
        return config.r, config.mini_r if config.init_weights == "mini" else info.out_features

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        block = widened(s.miss_block)
        groups = torch.eye(s.miss_r, dtype=block.dtype, device=block.device)
        a = groups.repeat(1, -(-s.in_features // s.miss_r))[:, : s.in_features]
        return a, block.repeat(1, s.out_features // block.shape[1]).t()

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        block = widened(s.miss_block)
        whole: Tensor = block.t().repeat(s.out_features // block.shape[1], -(-s.in_features // s.miss_r))
        return whole[:, : s.in_features]

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        block, r = s.miss_block, s.miss_r
        x = s.miss_dropout(s.cast(x, block.dtype))
        whole = x.shape[-1] // r * r
        sums = x[..., :whole].reshape(*x.shape[:-1], -1, r).sum(-2)
        if whole < x.shape[-1]:
            sums = sums + F.pad(x[..., whole:], (0, r - x.shape[-1] % r))
        copies = y.shape[-1] // block.shape[1]
        if copies == 1:
            return plus_product(y, sums, block)
        added: Tensor = (sums @ block).repeat(*[1] * (x.dim() - 1), copies)
        return y + added

    def _fusible(self, s: Any) -> bool:
        return s.miss_block.shape[1] == s.out_features and is_thin(s.miss_r, s)


class _Bat(Miss):
    needs_base_weight = True
    divisors: ClassVar[dict[str, tuple[str, ...]]] = {"r": ("in_features", "out_features")}

    def _fusible(self, s: Any) -> bool:
        return False

    def check_config(self, config: MissConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.miss_dropout and not loading:
            raise ValueError("`miss_dropout` cannot act with init_weights='bat', which changes the weight.")

    def _shape(self, config: MissConfig, info: LayerInfo) -> tuple[int, ...]:
        return info.out_features // config.r, config.r, config.r

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> Any:
        return None

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        assert w is not None
        return _bat(w, s.miss_block)

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        frozen, r = inner.frozen(), s.miss_r
        if frozen is None:
            y, w = inner(x), inner.weight()[0]
            return y + inner.apply(x, _bat(w, s.miss_block).to(x.dtype))
        if x[..., 0].numel() < r and not torch.is_grad_enabled():
            return _bat_of_few(x, frozen(), s.miss_block, inner.bias())

        def rows(w: Tensor, i: int, j: int, blocks: Tensor) -> Tensor:
            return w[i:j] + _bat(w[i:j], blocks[i // r : j // r])

        return weight_side(x, inner.info.out_features, frozen, rows, s.miss_block, bias=inner.bias(), align=r)


_BAT = _Bat()


def _bat(w: Tensor, blocks: Tensor) -> Tensor:
    """W_pq B_p + B_p for rows p of blocks. One product: W_p as [r (o), in / r (q)] rows of length r."""
    n, r, _ = blocks.shape
    blocks = blocks.to(torch.promote_types(blocks.dtype, torch.promote_types(w.dtype, torch.float32)))
    added = torch.bmm(w.to(blocks.dtype).reshape(n, -1, r), blocks).view(n, r, -1, r)
    return (added + blocks[:, :, None]).view(w.shape)


def _bat_of_few(x: Tensor, w: Tensor, blocks: Tensor, b: Tensor | None) -> Tensor:
    """W_pq (x_q + B_p x_q) + B_p x_q, summed over q: cheaper for fewer tokens than r, on whose activations B_p acts."""
    (n, r, _), x_blocks = blocks.shape, x.reshape(-1, x.shape[-1] // blocks.shape[1], blocks.shape[1])
    turned = x_blocks.flatten(0, 1).to(blocks.dtype) @ blocks.transpose(1, 2)  # [p, T q, r]
    seen = turned.view(n, *x_blocks.shape).to(x.dtype) + x_blocks
    y = torch.bmm(seen.flatten(2), w.to(x.dtype).view(n, r, -1).transpose(1, 2))
    y = y + turned.view(n, *x_blocks.shape).sum(2).to(x.dtype)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], n * r)
    return y if b is None else y + b.to(y.dtype)
