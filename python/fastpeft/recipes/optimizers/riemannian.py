"""Riemannian preconditioning: the gradients of A and B, each rescaled by the other's Gram matrix (arXiv 2402.02347)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...weights.base import widened
from .pairs import LoraPair, lora_pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` over what the model trains, whose step first rescales the gradients of LoRA's A and B.

    reg: added to the diagonals before inverting. Other arguments go to `optimizer_cls`. Embeddings and
    convolutions with a kernel are updated plainly. Closures are refused: they would compute the gradients anew.
    """
    if not issubclass(optimizer_cls, Optimizer):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    pairs = [pair for pair in lora_pairs(model) if pair.a.requires_grad and pair.b.requires_grad]
    if not pairs:
        raise ValueError("no trainable pair: create_riemannian_optimizer needs lora_A/lora_B parameter pairs.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        what = f"{optimizer_cls.__name__} requires a closure: it computes gradients inside its step"
        raise ValueError(f"{what}, which rescaling would spoil.")

    class RiemannianPreconditionedOptimizer(optimizer_cls):  # type: ignore[valid-type, misc]
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if closure is not None:
                raise ValueError("The Riemannian-preconditioned optimizer does not support closures.")
            for pair in pairs:
                _rescale(pair, reg)
            return super().step()

    return RiemannianPreconditionedOptimizer([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)


def _rescale(pair: LoraPair, reg: float) -> None:
    a, b = widened(pair.a.detach()), widened(pair.b.detach())
    if pair.a.grad is not None:
        pair.a.grad.copy_(_inverse(b.T @ b, reg) @ pair.a.grad.to(a.dtype))
    if pair.b.grad is not None:
        pair.b.grad.copy_(pair.b.grad.to(a.dtype) @ _inverse(a @ a.T, reg))


def _inverse(gram: Tensor, reg: float) -> Tensor:
    eye = torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)
    inverse: Tensor = torch.linalg.pinv(gram + reg * eye)
    return inverse
