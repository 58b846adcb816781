"""LoRA-GA: A and B from the singular vectors of the loss's gradient with respect to W (arXiv 2407.05000)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.lora.start.loraga import GRADIENT
from .layers_of import TargetLayer, load_tensors, means_over_passes, save_tensors, target_layers


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Measure the gradients that LoRA-GA starts from. To be called before `get_peft_model`, which uses them up.

    train_step: runs the model forward and backward, once or several times; the gradients' mean is kept, on each layer.
    cache_file: take the gradients from there if it exists, and write them there if not. Quantised layers work too: the
    gradients are made of each layer's inputs and output gradients, and no weight need require any.
    """
    if lora_config.lora_ga_config is None:
        config = "LoraConfig(init_lora_weights='lora_ga', lora_ga_config=LoraGAConfig(...))"
        raise ValueError(f"If you want to use LoRA-GA, pass {config}.")
    layers = target_layers(model, lora_config)
    found = load_tensors(cache_file, [f"{name}.{GRADIENT}" for name in layers])
    if found is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        try:
            for p in trained:
                p.requires_grad_(False)
            with torch.enable_grad():
                means = means_over_passes(model, layers, train_step, True, _gradient)
        finally:
            for p in trained:
                p.requires_grad_(True)
        found = {f"{name}.{GRADIENT}": gradient for name, gradient in means.items()}
        save_tensors(cache_file, found)
    for name, layer in layers.items():
        gradient = found.get(f"{name}.{GRADIENT}")
        if gradient is not None:
            setattr(layer.info.module, GRADIENT, gradient)


def _gradient(layer: TargetLayer, x: Tensor, output: Tensor, add: Callable[[Tensor], None]) -> Tensor:
    """Add the gradient of a layer's weight, in the weight's layout, in each backward pass."""
    if not output.requires_grad:  # nothing before this layer does
        output = output.detach().requires_grad_()

    def backward(dy: Tensor) -> None:
        dy = dy.flatten(0, -2)
        add((x.t() @ dy if layer.info.base.fan_in_fan_out else dy.t() @ x).float())

    output.register_hook(backward)  # type: ignore[no-untyped-call]
    return output
