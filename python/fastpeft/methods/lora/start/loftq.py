"""LoftQ: a quantised base and an adapter that together come close to W (arXiv 2310.08659)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import peft_kernels

from ....config.seen_as_peft import SeenAsPeft
from ...base_edit import BaseEdit
from ...method import LayerInfo, State
from . import MAX_ITERATIONS, Start


@dataclass
class LoftQConfig(SeenAsPeft):
    """loftq_bits: 4 (NF4) or 8 (int8, a scale per row). loftq_iter: how often quantising and decomposing alternate."""

    loftq_bits: int = 4
    loftq_iter: int = 1


def low_rank(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with B A the best rank-r approximation of W, its singular values split evenly."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    root = torch.sqrt(s[:r])
    return root[:, None] * vh[:r], u[:, :r] * root


def quantised(w: Tensor, bits: int) -> Tensor:
    """W as it is after quantising: NF4 in blocks of 64, or int8 with a scale per row."""
    if bits == 4:
        return peft_kernels.dequantize_4bit(peft_kernels.quantize_4bit(w.float(), nested=False), dtype=w.dtype)
    scale = w.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    return torch.round(w * (127.0 / scale)) * (scale / 127.0)


@dataclass(frozen=True)
class QuantisedBase(BaseEdit):
    """The edit of the base: what quantising W, less what the last but one adapter held, leaves of it."""

    bits: int
    held: tuple[Tensor, Tensor] | None = None

    def __call__(self, w: Tensor) -> Tensor:
        if self.held is None:
            return quantised(w, self.bits)
        a, b = (t.to(w) for t in self.held)
        return quantised(w - b @ a, self.bits)


class LoftQ(Start):
    name = "loftq"
    shown = "LoftQ"
    field = "loftq_config"
    takes_base = False

    def complete(self, config: Any, chosen: bool) -> None:
        if isinstance(config.loftq_config, LoftQConfig):
            config.loftq_config = dict(vars(config.loftq_config))
        if config.loftq_config and not isinstance(config.loftq_config, dict):
            raise ValueError(f"`loftq_config` should be a LoftQConfig or a dictionary, got {config.loftq_config!r}")
        if chosen and not config.loftq_config:
            raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        if config.loftq_config and not chosen:
            self.ignored()
            config.loftq_config = {}

    def check_config(self, config: Any) -> None:
        bits, iterations = _options(config)
        if bits not in (4, 8):
            raise ValueError(f"loftq_bits should be 4 or 8, got {bits!r}")
        if not isinstance(iterations, int) or not 1 <= iterations <= MAX_ITERATIONS:
            raise ValueError(f"loftq_iter should be from 1 to {MAX_ITERATIONS}, got {iterations!r}")

    def initialise(self, config: Any, info: LayerInfo, scaling: float, a: Tensor, b: Tensor) -> State:
        if info.quantized is None:
            return super().initialise(config, info, scaling, a, b)
        if not a.is_meta:
            raise ValueError(f"LoftQ needs the unquantised weight of {info.name!r}: use `replace_lora_weights_loftq`.")
        return {}

    def factors(self, config: Any, info: LayerInfo, scaling: float, w: Tensor) -> tuple[Tensor, Tensor, QuantisedBase]:
        """A, B and the edit: each iteration quantises what the adapter lacks and adapts to what that lost."""
        bits, iterations = _options(config)
        held: tuple[Tensor, Tensor] | None = None
        for i in range(iterations):
            edit = QuantisedBase(bits, held)
            a, b = low_rank(w - edit(w), config.r)
            if i + 1 < iterations:
                held = a, b
        return a, b, edit


def _options(config: Any) -> tuple[Any, Any]:
    return config.loftq_config.get("loftq_bits", 4), config.loftq_config.get("loftq_iter", 1)
