"""Preparing a base model for training with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def prepare_model_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, auto_clear_cache: bool = True,
) -> nn.Module:  # fmt: skip
    """Freeze a quantised model, keep what is not quantised in float32, and turn gradient checkpointing on.

    The packed weights are left alone, whether in bitsandbytes' parameters or in our layers' buffers. Checkpointing is
    turned on for quantised models only. Returns `model`, changed in place.
    """
    options = dict(gradient_checkpointing_kwargs or {})
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing and is_quantized(model):
        # Reentrant checkpointing cuts the graph where no input requires gradients.
        if options.get("use_reentrant", True):
            enable_input_gradients(model)
        enable: Any = model.gradient_checkpointing_enable
        accepts = "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters
        enable(**({"gradient_checkpointing_kwargs": options} if accepts else {}))
    return model


def is_quantized(model: nn.Module) -> bool:
    """True if a model holds quantised layers, by its own flags or by what it is made of."""
    flagged = any(getattr(model, flag, False) for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"))
    return flagged or any(hasattr(module, "quant_weight") for module in model.modules())


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to `dtype` and keep what is trained in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def is_checkpointing(model: nn.Module) -> bool:
    """True if a transformers model recomputes its activations (asked by the name that its version has)."""
    name = "is_activation_checkpointing" if hasattr(type(model), "is_activation_checkpointing") else ""
    return bool(getattr(model, name or "is_gradient_checkpointing", False))


def enable_input_gradients(model: nn.Module) -> None:
    """Make the embeddings' output require gradients, which reentrant gradient checkpointing needs to reach adapters."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]
    elif hasattr(model, "get_input_embeddings"):
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
