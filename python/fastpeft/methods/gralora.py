"""GraLoRA: k x k blocks of W, each with an update of rank r / k of its own (arXiv 2505.20355).

The k blocks of x go through A, their parts are dealt to the k blocks of the output, and these go through B: a layer's
FLOPs grow as with a LoRA of rank r. hybrid_r adds a plain LoRA of that rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig, check_ranks
from .math.draws import kaiming_
from .math.factored import FactoredMethod, dropout, is_thin
from .method import Inner, LayerInfo, State


@dataclass
class GraloraConfig(HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="GRALORA"):
    """r: rank, of all blocks in a row of them together. gralora_k: blocks in a row and in a column. hybrid_r: rank of
    the plain LoRA beside them. alpha: numerator of the scaling alpha / (r + hybrid_r). gralora_dropout: of the input.
    init_weights: False starts with a random B."""

    not_in_peft = ("exclude_modules",)

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2

    def __post_init__(self) -> None:
        if self.gralora_k < 1:
            value = self.gralora_k
            raise ValueError(f"`gralora_k` should be a positive integer value but the value passed is {value}")
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ValueError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}")


class Gralora(FactoredMethod, config=GraloraConfig):
    tensors = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
    dropout = "gralora_dropout"
    counts = ("r",)
    divisor_error = "{size} should be divisible by {field}, but got {whole} and {part}"
    divisors: ClassVar[dict[str, tuple[str, ...]]] = {"gralora_k": ("in_features", "out_features")}
    examples = ({"r": 4}, {"r": 8, "gralora_k": 4, "hybrid_r": 2, "alpha": 3, "init_weights": False})

    def check_config(self, config: GraloraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.hybrid_r:
            check_ranks(config.hybrid_r, field="hybrid_r")

    def make_state(self, config: GraloraConfig, info: LayerInfo, shared: Any) -> State:
        k, r, hybrid = config.gralora_k, config.r, config.hybrid_r
        a, b = torch.empty(k, r, info.in_features // k), torch.zeros(k, info.out_features // k, r)
        for block_a, block_b in zip(a, b, strict=True):
            _start(block_a, block_b, config)
        general: tuple[nn.Module, nn.Module] = nn.Identity(), nn.Identity()
        if hybrid > 0:
            general = a2, b2 = nn.Linear(info.in_features, hybrid, False), nn.Linear(hybrid, info.out_features, False)
            _start(a2.weight.data, b2.weight.data.zero_(), config)
        return {
            "gralora_A": nn.Parameter(a.transpose(1, 2).contiguous()),
            "gralora_B": nn.Parameter(b.transpose(1, 2).contiguous()),
            "gralora_A_general": general[0], "gralora_B_general": general[1],
            "r": r, "hybrid_r": hybrid, "alpha": config.alpha, "scaling": config.alpha / (r + hybrid),
            "gralora_dropout": dropout(config.gralora_dropout), "gralora_k": k,
        }  # fmt: skip

    def scale(self, s: Any) -> float | None:
        return float(s.alpha / (s.r + s.hybrid_r))

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """A with the A of each block of x on its diagonal, B with the parts of B where the same rows of A go."""
        k = s.gralora_k
        diagonal: Callable[..., Tensor] = torch.block_diag
        a = diagonal(*s.gralora_A.transpose(1, 2))  # [(n, j, r / k), in]
        parts = s.gralora_B.unflatten(1, (k, -1))  # [j, n, r / k, out / k]
        b = torch.stack([diagonal(*[parts[j, n].t() for j in range(k)]) for n in range(k)], 1).flatten(1)
        if s.hybrid_r:
            a = torch.cat([a, s.gralora_A_general.weight])
            b = torch.cat([b, s.gralora_B_general.weight], 1)
        return a, b * s.scaling

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        a, b, k = s.gralora_A, s.gralora_B, s.gralora_k
        x = s.gralora_dropout(s.cast(x, a.dtype))
        flat = x.reshape(-1, x.shape[-1])
        z = torch.bmm(flat.view(len(flat), k, -1).transpose(0, 1), a)  # [n, T, (j, r / k)]
        z = z.view(k, len(flat), k, -1).permute(2, 1, 0, 3).reshape(k, len(flat), -1)  # [j, T, (n, r / k)]
        added = torch.bmm(z, b * s.scaling).transpose(0, 1).reshape(y.shape)
        if s.hybrid_r:
            added = added + s.gralora_B_general(s.gralora_A_general(x)) * s.scaling
        return y + added

    def _fusible(self, s: Any) -> bool:
        return is_thin(s.gralora_k * s.r + s.hybrid_r, s)  # the factors are k times as wide as what `output` needs


def _start(a: Tensor, b: Tensor, config: GraloraConfig) -> None:
    kaiming_(a)
    if not config.init_weights:
        kaiming_(b)
