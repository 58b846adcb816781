"""OFT: the input of a layer is rotated in blocks, W -> W R^T (arXiv 2306.07280; truncated Cayley form: 2506.19847).

In an embedding the rows are rotated, W -> R^T W. Blocks act on activations: T d H multiplications for T tokens, d
features and blocks of H, against T d^2 of the layer. PEFT's forward of two adapters rotates in the other order than its
merge; here both do what the merge does. In a convolution the weight is rotated (PEFT folds rotated patches, which
overlap, so that it is not the identity at the start). module_dropout, which PEFT accepts and ignores, works.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import cayley

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig, check
from ..config.types import PeftWarning
from .math.draws import normal_
from .math.rotation import BlockDropout, Butterfly, skew
from .method import Inner, LayerInfo, State


@dataclass
class OFTConfig(HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="OFT"):
    """r: number of blocks, or oft_block_size: their size; the other is 0. Either is changed to a divisor of the layer's
    size. module_dropout: share of the blocks that are the identity in a training step. coft, eps: keep the rotation's
    generator within this norm. block_share: one block for all. use_cayley_neumann: the rotation from
    num_cayley_neumann_terms of a series rather than by solving, which is exact."""

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r != 0) == (self.oft_block_size != 0):
            raise ValueError(
                f"Either `r` or `oft_block_size` must be non-zero, and not both: r x oft_block_size is the layer's "
                f"size. Got r={self.r} and oft_block_size={self.oft_block_size}. (Adapters of PEFT < 0.14 cannot be "
                "loaded: they are another parametrisation.)"
            )


class OFTRotationModule(nn.Module):
    """weight: for each block the entries above the diagonal of its skew-symmetric generator."""

    def __init__(self, config: OFTConfig, blocks: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 if config.block_share else blocks, size * (size - 1) // 2))
        self.size, self.eps = size, config.eps if config.coft else None
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        if not config.init_weights:
            normal_(self.weight, std=0.1)

    def blocks(self) -> Tensor:
        vector: Tensor = self.weight
        if self.eps is not None:
            with torch.no_grad():
                norm = vector.norm(dim=1, keepdim=True) * 2**0.5
                limit = self.eps / len(vector) ** 0.5
                within = torch.where(norm <= limit, vector, vector * (limit / norm))
                if self.training:
                    vector.data.copy_(within)  # as PEFT: the next step starts from here
            vector = vector + (within - vector).detach()
        q = skew(vector, self.size)
        return cayley(-q) if self.terms is None else cayley(q, self.terms)  # PEFT's two forms turn in opposite ways


class OFT(Butterfly, config=OFTConfig):
    tensors = ("oft_R", "oft_embedding_R")
    kinds = Butterfly.kinds | {"embedding"}
    examples = (
        {"oft_block_size": 4},
        {"oft_block_size": 2, "use_cayley_neumann": False},
        {"r": 2, "oft_block_size": 0, "block_share": True, "num_cayley_neumann_terms": 3},
        {"oft_block_size": 4, "coft": True, "eps": 0.2, "module_dropout": 0.5, "num_cayley_neumann_terms": 6},
    )

    def check_config(self, config: OFTConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.r < 0 or config.oft_block_size < 0:
            raise ValueError(f"`r` and `oft_block_size` should not be negative: {config.r}, {config.oft_block_size}")
        check(config, "num_cayley_neumann_terms", 1 <= config.num_cayley_neumann_terms <= 100, "in 1..100")

    def make_state(self, config: OFTConfig, info: LayerInfo, shared: Any) -> State:
        name, features = "oft_R", self.features(info)
        if info.kind == "embedding":
            name, features = "oft_embedding_R", info.out_features
        field = "r" if config.r else "oft_block_size"
        wanted = getattr(config, field)
        found = nearest_divisor(features, wanted)
        if found != wanted:
            warnings.warn(f"Invalid `{field}` ({wanted})! Adjusted `{field}` to ({found}).", PeftWarning, stacklevel=2)
        blocks, size = (found, features // found) if config.r else (features // found, found)
        return {
            name: OFTRotationModule(config, blocks, size),
            "r": blocks,
            "oft_block_size": size,
            "oft_dropout": BlockDropout(config.module_dropout) if config.module_dropout > 0 else nn.Identity(),
        }

    def parameter(self, s: Any) -> Tensor:
        return (s.get("oft_R") or s.oft_embedding_R).weight  # type: ignore[no-any-return]

    def blocks(self, s: Any) -> Tensor:
        module = s.get("oft_R") or s.oft_embedding_R
        return s.oft_dropout(module.blocks()).unsqueeze(0)  # type: ignore[no-any-return]

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if s.get("oft_R") is None:
            return self.rotate(s, w.T).T, b
        return super().merged(s, shared, w, b)

    def input(self, s: Any, shared: Any, x: Tensor) -> Tensor:
        return x if s.get("oft_R") is None else super().input(s, shared, x)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        return self.rotate(s, y) if s.get("oft_R") is None else y


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to `wanted`, the smaller of two."""
    if wanted >= n:
        return n
    lower = next(k for k in range(wanted, 0, -1) if n % k == 0)
    higher = next(k for k in range(wanted, n + 1) if n % k == 0)
    return lower if wanted - lower <= higher - wanted else higher
