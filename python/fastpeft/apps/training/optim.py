"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from peft_kernels import adamw

from ... import AdamW
from .config import TrainConfig
from .errors import UserError

_LEAST_8BIT = 4096  # elements: bitsandbytes keeps the states of smaller tensors in float32


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """Groups by weight decay (none for biases and norms) and by LoRA+ ratio; ``scale`` multiplies the learning rate."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        scale = config.lora_plus_ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
        groups.setdefault((decay, scale), []).append(parameter)
    if not groups:
        raise UserError("the model has no trainable parameter", "check lora.target_modules")
    return [
        {"params": parameters, "weight_decay": decay, "scale": scale, "lr": config.learning_rate * scale}
        for (decay, scale), parameters in groups.items()
    ]


def make_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer named in the config over those of the parameters that are trainable."""
    groups = parameter_groups(named, config)
    betas, lr = (float(config.betas[0]), float(config.betas[1])), config.learning_rate
    name = config.optimizer
    if name == "adamw":
        if adamw.reason([p for group in groups for p in group["params"]]) is None:
            ours: torch.optim.Optimizer = AdamW(groups, lr=lr, betas=betas, eps=config.epsilon)
            return ours
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.epsilon, fused=_fused(groups))
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=config.epsilon, fused=_fused(groups))
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, momentum=config.momentum, eps=config.epsilon)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    return _eight_bit(name, groups, lr, betas, config)


def _eight_bit(
    name: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], config: TrainConfig
) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device
    if name.startswith("paged") and device.type == "cpu":
        raise UserError(f"optimizer={name} pages states out of a GPU's memory, and the model is in the host's",
                        f"use optimizer={name.removeprefix('paged_')}")  # fmt: skip
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"optimizer={name} needs bitsandbytes", "pip install bitsandbytes, or use optimizer=adamw"
        ) from error
    classes = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "lion_8bit": "Lion8bit"}
    extra = {} if name == "lion_8bit" else {"eps": config.epsilon}
    make = getattr(bitsandbytes.optim, classes[name])
    probe = torch.nn.Parameter(torch.zeros(_LEAST_8BIT, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        make([probe], lr=lr, betas=betas, **extra).step()
    except (NotImplementedError, RuntimeError, AttributeError, AssertionError, NameError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"optimizer={name}: bitsandbytes {bitsandbytes.__version__} does not run it on {device.type}: "
                        f"{line}", "update bitsandbytes, or use optimizer=adamw") from error  # fmt: skip
    optimizer: torch.optim.Optimizer = make(groups, lr=lr, betas=betas, **extra)
    return optimizer


def _fused(groups: list[dict[str, Any]]) -> bool:
    """torch's fused update is one pass over memory; it wants plain float tensors on CPU or CUDA."""
    tensors = [p for group in groups for p in group["params"]]
    return all(
        type(p) is torch.nn.Parameter and p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in tensors
    )


def warmup_steps(config: TrainConfig, steps: int) -> int:
    return int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * steps)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``: a pure function, so resuming needs no state."""
    warm = warmup_steps(config, steps)
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    low = config.min_lr_ratio
    done = (step - warm) / max(1, steps - warm)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "linear":
        factor = low + (1 - low) * (1 - done)
    elif config.schedule == "cosine":
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    elif config.schedule == "inverse_sqrt":
        factor = max(low, math.sqrt((warm + 1) / (step + 1)))
    else:  # wsd: stable, then linear down over the last share of all steps
        left = (steps - step) / max(1, round(config.decay * steps))
        factor = low + (1 - low) * min(1.0, left)
    return config.learning_rate * factor


def gradient_norm(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> float:
    """The norm over all gradients, before clipping."""
    if isinstance(optimizer, AdamW):
        found: float = optimizer.norm(gradients)
        return found
    return float(torch.nn.utils.get_total_norm(gradients))


def update(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], factor: float, in_place: bool) -> None:
    """A step with the gradients times a factor. in_place: whether they are read again afterwards, so multiplied."""
    if isinstance(optimizer, AdamW) and not in_place:
        optimizer.step(scale=factor)
        return
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
