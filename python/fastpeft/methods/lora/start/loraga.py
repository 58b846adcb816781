"""LoRA-GA: A and B from the singular vectors of the loss's gradient with respect to W (arXiv 2407.05000)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....config.base import check, check_choice
from ....config.seen_as_peft import SeenAsPeft
from ....config.types import PeftWarning
from ...method import LayerInfo, State
from . import Start

GRADIENT = "_peft_loraga_grad"  # of a layer, in its weight's layout, until the adapter is made


@dataclass
class LoraGAConfig(SeenAsPeft):
    """direction: which of the 2 r singular vectors go into A and which into B: alternating ("ArBr"), the second half
    into A ("A2rBr") or into B ("ArB2r"), or "random". scale: of B, "stable" (by stable_gamma), "weight_svd",
    "gd_scale", or "unit" for none."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        check_choice(self, "direction", "ArBr", "A2rBr", "ArB2r", "random")
        check_choice(self, "scale", "stable", "weight_svd", "gd_scale", "unit")
        check(self, "stable_gamma", self.stable_gamma > 0, "positive")


class LoraGA(Start):
    name = "lora_ga"
    shown = "LoRA-GA"
    field = "lora_ga_config"
    options = LoraGAConfig
    used = (GRADIENT,)
    others_plain = True
    rank_parts = 2  # 2 r singular vectors of the gradient are split between A and B

    def complete(self, config: Any, chosen: bool) -> None:
        if config.lora_ga_config is not None:  # without it `check_config` raises, and there is no harm in one too many
            super().complete(config, True)

    def check_config(self, config: Any) -> None:
        if config.lora_ga_config is None:
            what = "lora_ga_config must be provided when init_lora_weights='lora_ga'"
            raise ValueError(f"{what}: pass lora_ga_config=LoraGAConfig(...).")

    def for_edited(self, info: LayerInfo) -> bool:
        return not hasattr(info.module, GRADIENT)

    def initialise(self, config: Any, info: LayerInfo, scaling: float, a: Tensor, b: Tensor) -> State:
        if hasattr(info.module, GRADIENT):
            return super().initialise(config, info, scaling, a, b)
        if not a.is_meta:
            raise ValueError(f"There is no gradient of {info.name!r}: run `preprocess_loraga` first.")
        warnings.warn("A LoRA-GA adapter is loaded, but what it took from the base weight is in no file: the result is "
                      "right only on the residual base model. Save it with `path_initial_model_for_weight_conversion` "
                      "for any base.", PeftWarning, stacklevel=2)  # fmt: skip
        return {}

    def factors(self, config: Any, info: LayerInfo, scaling: float, w: Tensor) -> tuple[Tensor, Tensor, None]:
        r, options, gradient = config.r, config.lora_ga_config, getattr(info.module, GRADIENT).to(w)
        gradient = gradient.t() if info.base.fan_in_fan_out else gradient
        u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
        first, second = torch.arange(r), torch.arange(r, 2 * r)
        if options.direction == "random":
            of_a = of_b = torch.randperm(2 * r)[:r]
        else:
            places = {"ArBr": (2 * first + 1, 2 * first), "A2rBr": (second, first), "ArB2r": (first, second)}
            of_a, of_b = places[options.direction]
        a, largest = v.t()[of_a], s[of_b]
        b = u[:, of_b] @ torch.diag(largest)
        if options.scale == "stable":
            b = b * (w.shape[0] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "weight_svd":
            of_w = torch.svd_lowrank(w, q=r, niter=4)[1]
            if largest[0] > 0:
                b = b * (of_w[0] / largest[0])
        elif options.scale == "gd_scale":
            a, b = a / scaling, b / scaling
        return a, b, None
