"""LoftQ on a base that is quantised already: the adapter starts from what quantising lost (arXiv 2310.08659)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..methods.lora.start.loftq import low_rank
from ..model.combine import factors_of
from ..model.tuner import BaseTuner
from .model_files import ModelTensors


def replace_lora_weights_loftq(
    peft_model: nn.Module, model_path: str | None = None, adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:  # fmt: skip
    """Start a LoRA on a quantised base from what quantising lost: B A is close to W - dequantised(W). DoRA's m follows.

    The base may be quantised in any way (PEFT: by bitsandbytes, in 4 bits).
    model_path: the safetensors file of the unquantised model, or its folder (files may be sharded); None: where the
    Hub's cache has the model. callback: called with the model and the module's name after each replacement, which is
    taken back if it returns False; without it all are kept.
    """
    tuner = getattr(peft_model, "base_model", peft_model)
    if not isinstance(tuner, BaseTuner):
        raise TypeError(f"{type(peft_model).__name__} is not a PeftModel")
    layers = [
        (name, layer) for name, layer in tuner.adapter_layers()
        if layer.base.quantized is not None and hasattr(layer, "lora_A") and adapter_name in layer.lora_A
    ]  # fmt: skip
    if not layers:
        raise ValueError(f"The model has no quantised layer with a LoRA named {adapter_name!r}.")
    tensors = ModelTensors(model_path, tuner.model)
    with torch.no_grad():
        for name, layer in layers:
            name = name.removeprefix("model.")
            a, b = factors_of(layer, adapter_name)
            base = layer.unmerged_weight()[0]
            w = tensors.get(f"{name}.weight").to(base)
            if w.shape != base.shape:
                raise ValueError(
                    f"{name}.weight is {list(w.shape)} in {tensors.where}, {list(base.shape)} in the model"
                )
            state = [tensor for _, _, tensor in layer.adapter_state(adapter_name)]
            before = [tensor.clone() for tensor in state]
            for parameter, value in zip((a, b), low_rank(w - base, a.shape[0]), strict=True):
                parameter.copy_(value)
            if adapter_name in getattr(layer, "lora_magnitude_vector", ()):
                delta = layer.methods[adapter_name].delta_weight(layer.view(adapter_name), None, None)
                layer.lora_magnitude_vector[adapter_name].weight.copy_((base + delta.to(base)).norm(dim=1))
            if callback is not None and not callback(peft_model, name):
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
