"""BD-LoRA: a block-diagonal A or B, so that each shard of a sharded layer needs one block (arXiv 2510.23346)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....config.base import check
from ....config.seen_as_peft import SeenAsPeft
from ....weights.split import Split
from ...method import LayerInfo, State
from ..lora import Lora
from ..parts import held, part_out
from . import variant


@dataclass
class BdLoraConfig(SeenAsPeft):
    """target_modules_bd_a, target_modules_bd_b: parts of the names of modules whose A, or B, is block-diagonal.
    nblocks: blocks in each. match_strict: raise for a module in neither list (it has a plain LoRA otherwise)."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"Found overlapping modules in target_modules_bd lists: {sorted(both)}.")
        check(self, "nblocks", isinstance(self.nblocks, int) and self.nblocks >= 1, "a positive integer")


class BlockDiagonalLinear(nn.Module):
    """A linear map whose matrix has `nblocks` equal blocks on its diagonal; `weight` is the blocks below each other."""

    def __init__(self, in_features: int, out_features: int, nblocks: int, init_zero: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // nblocks))
        if not init_zero and not self.weight.is_meta:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.weight.reshape(self.nblocks, -1, self.weight.shape[1])
        return torch.einsum("...bi,boi->...bo", x.reshape(*x.shape[:-1], self.nblocks, -1), blocks).flatten(-2)

    def matrix(self) -> Tensor:
        return torch.block_diag(*self.weight.chunk(self.nblocks))  # type: ignore[no-any-return, no-untyped-call]

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """The whole matrix [out_features, in_features]; PEFT's name for it."""
        return self.matrix()


class PartBlocks(BlockDiagonalLinear):
    """The blocks of this process where blocks go with the parts of W: its part of the layer needs no others. Elsewhere
    all of them (dim None), from whose matrix it takes the rows or columns that W's part has."""

    def __init__(self, whole: BlockDiagonalLinear, split: Split, dim: int | None, narrow: int | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.nblocks = whole.in_features, whole.out_features, whole.nblocks
        self.split, self._narrow = split, narrow
        self._own_blocks = whole.nblocks if dim is None else whole.nblocks // split.size
        self.weight = held(split, whole.weight, dim)

    def matrix(self) -> Tensor:
        blocks = self.split.own(self.weight).chunk(self._own_blocks)
        whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return whole if self._narrow is None else self.split.narrowed(whole, self._narrow)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())


@variant("use_bdlora", BdLoraConfig)
class BdLora(Lora):
    """A module is matched by its own name, without what it is in. Its blocks are expanded for the fused kernel: A and B
    are small. Where processes split the outputs of a layer and B has blocks, or its inputs and A has, each process has
    its own blocks alone and its part of the rank."""

    parallel = frozenset({"tensor"})
    examples: ClassVar[Any] = (
        {"r": 4, "use_bdlora": BdLoraConfig([""], None, nblocks=2)},
        {"r": 4, "use_bdlora": BdLoraConfig(None, [""], nblocks=4)},
        {"r": 2, "use_bdlora": BdLoraConfig(match_strict=False), "lora_bias": True},
    )

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        super().check_layer(config, info)
        blocked, options = _blocked(config, info), config.use_bdlora
        if len(blocked) == 2:
            raise ValueError(f"Target {info.name!r} matches both target_modules_bd_a and target_modules_bd_b.")
        if not blocked and options.match_strict:
            raise ValueError(
                f"Target {info.name!r} matches neither A nor B block-diagonal patterns (target_modules_bd_a, "
                "target_modules_bd_b). Set match_strict=False if this is intentional."
            )
        n = options.nblocks
        for which, sizes in blocked.items():
            if any(size % n for size in sizes):
                what = f"{which} of {info.name!r}, from {sizes[0]} to {sizes[1]} features,"
                raise ValueError(f"{what} are not divisible by nblocks={n}.")
        if config.lora_bias and "B" in blocked:
            raise ValueError(f"lora_bias=True is not for {info.name!r}: a block-diagonal B has no bias.")

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        state, nblocks = super().make_state(config, info, shared), config.use_bdlora.nblocks
        for which, (ins, outs) in _blocked(config, info).items():
            state[f"lora_{which}"] = BlockDiagonalLinear(ins, outs, nblocks, init_zero=which == "B")
        return state

    def parted(self, config: Any, state: State, info: LayerInfo) -> None:
        split: Any = info.base.split  # type: ignore[attr-defined]
        letter, other = "BA"[split.dim], "AB"[split.dim]  # what is split as W is, and what is not
        wholes = {n: state[f"lora_{n}"] for n in "AB" if isinstance(state[f"lora_{n}"], BlockDiagonalLinear)}
        fits = letter in wholes and other not in wholes and config.use_bdlora.nblocks % split.size == 0
        for name, whole in wholes.items():
            own = name == letter
            state[f"lora_{name}"] = PartBlocks(
                whole, split, 0 if own and fits else None, split.dim if own and not fits else None
            )
        # of the other the rank is split too: the rows of A, or the columns of B
        part_out(state, info, {other: split.dim} if fits else {})


def _blocked(config: Any, info: LayerInfo) -> dict[str, tuple[int, int]]:
    """Input and output sizes of those of A and B that are block-diagonal in a layer."""
    name, options = info.name.rpartition(".")[2], config.use_bdlora
    a, b = options.target_modules_bd_a or (), options.target_modules_bd_b or ()
    sizes = {"A": (a, (info.in_features, config.r)), "B": (b, (config.r, info.out_features))}
    return {which: size for which, (parts, size) in sizes.items() if any(part in name for part in parts)}
