"""LoRA-GA: A and B from the singular vectors of the loss's gradient with respect to W (arXiv 2407.05000)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.lora.start.loraga import GRADIENT


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Measure the gradients that LoRA-GA starts from. To be called before `get_peft_model`, which uses them up.

    train_step: runs the model forward and backward, once or several times; the gradients' mean is kept, on each layer.
    cache_file: take the gradients from there if it exists, and write them there if not. Quantised layers work too: the
    gradients are made of each layer's inputs and output gradients, and no weight need require any.
    """
    from .layers_of import load_tensors, save_tensors, target_layers

    if lora_config.lora_ga_config is None:
        raise ValueError("LoRA-GA needs LoraConfig(init_lora_weights='lora_ga', lora_ga_config=LoraGAConfig(...))")
    layers = target_layers(model, lora_config)
    found = load_tensors(cache_file, [f"{name}.{GRADIENT}" for name in layers])
    if found is None:
        found = {f"{name}.{GRADIENT}": g for name, g in _gradients(model, layers, train_step).items()}
        save_tensors(cache_file, found)
    for name, layer in layers.items():
        gradient = found.get(f"{name}.{GRADIENT}")
        if gradient is not None:
            setattr(layer.info.module, GRADIENT, gradient)


def _gradients(model: nn.Module, layers: Any, train_step: Callable[[], None]) -> dict[str, Tensor]:
    """The mean over backward passes of the gradient of each layer's weight, in the weight's layout."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def watch(name: str, layer: Any) -> None:
        def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].detach().flatten(0, -2)
            if not output.requires_grad:  # nothing before this layer does
                output = output.detach().requires_grad_()

            def backward(dy: Tensor) -> None:
                dy = dy.flatten(0, -2)
                gradient = (x.t() @ dy if layer.info.base.fan_in_fan_out else dy.t() @ x).float()
                sums[name] = sums[name] + gradient if name in sums else gradient
                counts[name] = counts.get(name, 0) + 1

            output.register_hook(backward)  # type: ignore[no-untyped-call]
            return output

        handles.append(layer.info.module.register_forward_hook(forward))

    was_training = model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.train()
        for p in trained:
            p.requires_grad_(False)
        for name, layer in layers.items():
            watch(name, layer)
        with torch.enable_grad():
            train_step()
    finally:
        for handle in handles:
            handle.remove()
        for p in trained:
            p.requires_grad_(True)
        model.train(was_training)
    return {name: total / counts[name] for name, total in sums.items()}
