"""VeLoRA: what A needs of its input for the gradient is kept as one number per group of features (arXiv 2405.17991).

The input is cut into groups of g features; each group keeps its product with a unit vector v, and the backward pass
puts scale * product * v in its place. So the LoRA branch saves 1/g of its input. The forward pass is a plain
LoRA, and so is the merged weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....config.base import check_choice
from ....config.seen_as_peft import SeenAsPeft
from ...fused import Fused
from ...method import AdaptedLayer, Inner, LayerInfo, State
from ..lora import Lora
from . import variant


@dataclass
class VeloraConfig(SeenAsPeft):
    """num_groups: groups of input features. scale: of the restored inputs. init_type: v is the direction of the mean
    group of each batch ("batch_average"), of the first batch only ("batch_average_once"), or "random"."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        for name in ("num_groups", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` should be positive, got {getattr(self, name)!r}.")
        also = (
            f" Unsupported `init_type` {self.init_type!r}. Supported values are 'batch_average_once', 'batch_average', "
            "and 'random'."
        )
        check_choice(self, "init_type", "batch_average_once", "batch_average", "random", also=also)


@variant("velora_config", VeloraConfig)
class Velora(Lora):
    tensors = (*Lora.tensors, "lora_velora_embed")
    examples: ClassVar[Any] = (
        {"r": 4, "velora_config": VeloraConfig(num_groups=5)},  # 24 features: the last group is padded
        {"r": 2, "velora_config": VeloraConfig(num_groups=4, init_type="random"), "lora_bias": True},
    )

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        super().check_layer(config, info)
        groups = config.velora_config.num_groups
        if groups > info.in_features:
            has = f"{info.name!r} has features ({info.in_features})"
            raise ValueError(f"VeloraConfig(num_groups={groups}) is more than {has}.")

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        state, options = super().make_state(config, info, shared), config.velora_config
        v = torch.zeros(-(-info.in_features // options.num_groups))
        if options.init_type == "random" and not v.is_meta:
            v = _direction(torch.randn(len(v)))
        given = {f"lora_velora_{name}": value for name, value in vars(options).items()}
        return {**state, "lora_velora_embed": v, **given}

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        if not (s.training and torch.is_grad_enabled()):
            return super().output(s, shared, x, y, inner)
        weight, v = s.lora_A.weight, s.lora_velora_embed
        x = s.lora_dropout(x.to(weight.dtype))
        init = s.lora_velora_init_type
        once = init == "batch_average_once"
        compiling = torch.compiler.is_compiling()  # then no branch may depend on data
        if init == "batch_average" or (once and (compiling or not v.any())):
            with torch.no_grad():
                found = _direction(_cut(x, s.lora_velora_num_groups).flatten(0, -2).mean(0))
                v.copy_(torch.where(v.any(), v, found) if once and compiling else found)
        low: Tensor = _Compressed.apply(x, weight, v.clone(), s.lora_velora_num_groups, s.lora_velora_scale)  # type: ignore[no-untyped-call]
        return y + s.lora_B(low) * s.scaling  # type: ignore[no-any-return]

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        plain = super().fused(layer, s, shared)
        return None if plain is None else lambda x: None if layer.training and torch.is_grad_enabled() else plain(x)


class _Compressed(torch.autograd.Function):
    """x A^T, which keeps `groups` numbers of each row of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
        v = v.to(x.dtype)
        ctx.save_for_backward(_cut(x, groups) @ v, weight, v)
        ctx.scale = scale
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, v = ctx.saved_tensors
        dy, dx, dw = grads[0].to(weight.dtype), None, None  # autocast gives them in its own dtype
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
        if ctx.needs_input_grad[1]:
            # (dy^T kept) v, group by group: the restored input is never whole.
            products = dy.reshape(-1, dy.shape[-1]).t() @ kept.reshape(-1, kept.shape[-1])
            dw = (products.unsqueeze(-1) * (v * ctx.scale)).flatten(1)[:, : weight.shape[1]]
        return dx, dw, None, None, None


def _cut(x: Tensor, groups: int) -> Tensor:
    """[..., features] as [..., groups, features of a group], padded with zeros."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(*x.shape[:-1], groups, size)


def _direction(v: Tensor) -> Tensor:
    v = v.float()
    v = torch.where(v.any(), v, torch.ones_like(v))
    return v / torch.linalg.vector_norm(v)  # type: ignore[no-any-return]
