"""BOFT: the input is rotated by butterfly factors, each of them blocks between permutations (arXiv 2311.06243).

W -> diag(s) W O^T with O = M_m ... M_1 and M_i = P_i B_i P_i^T. P_i is a reshape and B_i a batch of small products, so
that m factors of blocks of H cost m T d H multiplications against T d^2 of the layer; PEFT multiplies d x d matrices,
and without its CUDA extension has one factor whatever the configuration says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import cayley

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig, check
from .math.draws import normal_
from .math.rotation import BlockDropout, Butterfly
from .method import AdaptedLayer, Inner, LayerInfo, State


@dataclass
class BOFTConfig(HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="BOFT"):
    """boft_block_size: size of the blocks, or boft_block_num: their number; the other is 0. boft_n_butterfly_factor:
    number of factors; each further one doubles the reach of a block. boft_dropout: share of a factor's blocks that are
    the identity in a training step."""

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.boft_block_size != 0) == (self.boft_block_num != 0):
            raise ValueError(
                "Either `boft_block_size` or `boft_block_num` must be non-zero, and not both: their product is the "
                f"layer's size. Got {self.boft_block_size} and {self.boft_block_num}."
            )


class BOFT(Butterfly, config=BOFTConfig):
    tensors = ("boft_R", "boft_s")
    examples = (
        {"boft_block_size": 2},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3, "boft_dropout": 0.3},
        {"boft_block_size": 3, "init_weights": False},
    )

    def check_config(self, config: BOFTConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.boft_block_size < 0 or config.boft_block_num < 0:
            raise ValueError("`boft_block_size` and `boft_block_num` should not be negative")
        check(config, "boft_n_butterfly_factor", 1 <= config.boft_n_butterfly_factor <= 64, "in 1..64")

    def check_layer(self, config: BOFTConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        features, field = self.features(info), "boft_block_size" if config.boft_block_size else "boft_block_num"
        if features % getattr(config, field):
            raise ValueError(
                f"{info.name!r}: in_features ({features}) must be divisible by {field} ({getattr(config, field)})!"
            )
        size, count = self._blocks(config, features)
        factors = config.boft_n_butterfly_factor
        if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
            raise ValueError(
                f"{info.name!r}: boft_n_butterfly_factor ({factors}) needs an even block size and a number of blocks "
                f"divisible by {2 ** (factors - 1)}, and there are {count} blocks of {size}!"
            )

    @staticmethod
    def _blocks(config: BOFTConfig, features: int) -> tuple[int, int]:
        size = config.boft_block_size or features // config.boft_block_num
        return size, features // size

    def make_state(self, config: BOFTConfig, info: LayerInfo, shared: Any) -> State:
        size, count = self._blocks(config, self.features(info))
        r = torch.zeros(config.boft_n_butterfly_factor, count, size, size)
        scale = torch.ones(*((info.out_features, 1) if info.kind == "linear" else (1, info.out_features)))
        if not config.init_weights:
            normal_(r, std=0.1)
            normal_(scale, mean=1.0, std=0.1)
        return {
            "boft_R": nn.Parameter(r),
            "boft_s": nn.Parameter(scale),
            "boft_block_size": size,
            "boft_block_num": count,
            "boft_dropout": BlockDropout(config.boft_dropout) if config.boft_dropout > 0 else nn.Identity(),
        }

    # Files. PEFT without its CUDA extension, on any CPU, makes one factor and leaves the configuration as it was.

    def fields_in_file(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        counts = {tuple(shape)[:1] for key, shape in shapes.items() if key.endswith(".boft_R")}
        return {"boft_n_butterfly_factor": 1} if counts == {(1,)} else {}

    def make_room(
        self, layer: AdaptedLayer, adapter: str, tensors: Mapping[str, Tensor]
    ) -> Callable[[], None] | None:
        container = layer.boft_R
        old: nn.Parameter = container[adapter]
        one = (1, *old.shape[1:])
        if "boft_R" not in tensors or tensors["boft_R"].shape != one or old.shape == one:
            return None
        container[adapter] = nn.Parameter(old.detach().new_zeros(one), old.requires_grad)
        return functools.partial(container.set, adapter, old)

    def parameter(self, s: Any) -> Tensor:
        return s.boft_R  # type: ignore[no-any-return]

    def blocks(self, s: Any) -> Tensor:
        r = s.boft_R
        return s.boft_dropout(cayley(0.5 * (r.mT - r)))  # type: ignore[no-any-return]

    def gain(self, s: Any) -> Tensor:
        return s.boft_s  # type: ignore[no-any-return]

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, b = super().merged(s, shared, w, b)
        return w * s.boft_s.to(w.dtype).view(-1, *[1] * (w.dim() - 1)), b

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        scale = s.boft_s.flatten()
        b, y = inner.bias(), y.to(torch.promote_types(y.dtype, scale.dtype))
        # The bias is not scaled: (y - b) s + b.
        return y * scale if b is None else torch.addcmul(b.to(y.dtype) * (1 - scale), y, scale)
