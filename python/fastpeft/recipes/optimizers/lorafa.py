"""LoRA-FA: A stays as it is; B's gradient is the one whose B A comes closest to the full gradient (arXiv 2308.03303).

That is g (A A')^-1 / scaling^2 for B's gradient g. AdamW without decoupling otherwise, as transformers had it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...inject.modules import adapter_layers
from ...weights.base import widened
from .pairs import lora_pairs

DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """params: groups with `names` and `scaling_factors` for their `params`, as `create_lorafa_optimizer` makes them. A
    group with a `lora_B` holds the `lora_A` of the same name too; all others are plainly updated."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, correct_bias: bool = True,
    ) -> None:  # fmt: skip
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} (betas[{i}]) - should be in [0.0, 1.0)")
        if eps < 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_name = dict(zip(group["names"], group["params"], strict=True))
            for (name, p), scaling in zip(by_name.items(), self._scalings(group), strict=True):
                if p.grad is None:
                    continue
                a = by_name.get(name.replace("lora_B", "lora_A")) if "lora_B" in name and p.ndim == 2 else None
                self._update(p, p.grad if a is None else _projected(p.grad, a, scaling), group)
        return loss

    def _scalings(self, group: dict[str, Any]) -> Sequence[Any]:
        """One for each parameter; a group may still have one for all, as before PEFT 0.19."""
        if "scaling_factors" not in group:
            group["scaling_factors"] = [group["scaling_factor"]] * len(group["params"])
            text = "`scaling_factor` is deprecated. Please use `scaling_factors` instead, one for each parameter."
            warnings.warn(text, FutureWarning, stacklevel=4)
        return list(group["scaling_factors"])

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(grad, alpha=1.0 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def _projected(grad: Tensor, a: Tensor, scaling: float) -> Tensor:
    """The gradient for B. In float32: PEFT multiplies in bfloat16 even where the adapter is float32."""
    a = widened(a)
    gram = a @ a.T + DAMPING * torch.eye(a.shape[0], device=a.device, dtype=a.dtype)
    projected: Tensor = (grad.to(a.dtype) @ torch.linalg.pinv(gram)) / scaling**2
    return projected.to(grad.dtype)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """A LoRA-FA optimizer; A of every LoRA in the model stops requiring gradients.

    r, lora_alpha: accepted as in PEFT; each layer's own scaling is used. use_rslora: deprecated; None, or what the
    active adapters' configurations say.
    """
    configs: dict[str, Any] = {n: model.peft_config[n] for n in model.active_adapters if n in model.peft_config}  # type: ignore[union-attr, index, operator]
    if use_rslora is not None:
        others = [n for n, c in configs.items() if bool(getattr(c, "use_rslora", False)) != use_rslora]
        if others:
            raise ValueError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the configurations of "
                f"{', '.join(others)} say otherwise. Leave it out: the configuration decides."
            )
        warnings.warn("`use_rslora` of create_lorafa_optimizer is deprecated: the configuration decides.",
                      FutureWarning, stacklevel=2)  # fmt: skip
    scaling = {id(p): pair.scaling for pair in lora_pairs(model) for p in (pair.a, pair.b)}
    for _, layer in adapter_layers(model):
        tables = [getattr(layer, name, {}).items() for name in ("lora_embedding_A", "lora_embedding_B")]
        scaling |= {id(p): layer.scaling[adapter] for table in tables for adapter, p in table}
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad or id(p) in scaling]
    group = {
        "params": [p for _, p in named],
        "names": [name for name, _ in named],
        "scaling_factors": [scaling.get(id(p)) for _, p in named],
    }
    return LoraFAOptimizer([group], lr, weight_decay=weight_decay)
