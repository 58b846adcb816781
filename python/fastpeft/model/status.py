"""Reports on the adapters of a model and their state, as PEFT gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..inject.modules import AdapterModule, adapter_modules
from ..layer.containers import AdapterDict
from ..weights.nf4 import Quant4bitWeight
from ..weights.parameters_4bit import packed_in
from ..weights.quant_embedding import QuantEmbedding
from .tuner import BaseTuner

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters that require gradients, all parameters). A 4-bit weight counts as many as it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":  # two elements a byte
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    seen: set[int] = set()  # of bytes that an embedding and its head share
    for module in model.modules():
        # Our quantised layers keep their bytes in buffers, so that nothing takes them for something to train.
        if Quant4bitWeight.accepts(module) or isinstance(module, QuantEmbedding):
            held = id(module._buffers.get("weight", module))
            total += 0 if held in seen else Quant4bitWeight(module).quant().numel
            seen.add(held)
        # Of experts' parameters in bitsandbytes' form the bytes are counted above.
        total += sum(packed.quant().numel - packed.counted for packed in packed_in(module))
    return trainable, total


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapter layer and each module that adapters train in full.

    model: a PeftModel (names then start below its tuner) or a model with injected adapters. Raises ValueError for a
    model without adapters.
    """
    tuner = _tuner(model, "get_layer_status")
    status = [_layer_status(name, module) for name, module in adapter_modules(tuner)]
    if not status:
        raise ValueError("No adapter layers found in the model: it is no PEFT model and has no injected adapters.")
    return status


def _tuner(model: nn.Module, asked: str) -> nn.Module:
    """The tuner of a PeftModel, or the model with injected adapters; TypeError where all adapters are prompts."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, BaseTuner):
        return model
    if all(config.is_prompt_learning for config in tuner.peft_config.values()):
        raise TypeError(
            f"{asked}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported: a "
            "prompt is in no layer."
        )
    return tuner


def _layer_status(name: str, module: AdapterModule) -> TunerLayerStatus:
    grads: dict[str, list[bool]] = {}
    devices: dict[str, set[str]] = {}
    for container in [c for c in module._modules.values() if isinstance(c, AdapterDict)]:
        for adapter in container:
            parameters = list(container.parameters_of(adapter))
            grads.setdefault(adapter, []).extend(p.requires_grad for p in parameters)
            found = [*parameters, *(t for _, t in container.tensors(adapter))]
            devices.setdefault(adapter, set()).update(t.device.type for t in found)
    return TunerLayerStatus(
        name=name,
        module_type=repr(module).partition("(")[0],
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters),
        requires_grad={adapter: _all_same(values) for adapter, values in grads.items() if values},
        available_adapters=sorted(module._get_available_adapters()),
        devices={adapter: sorted(found) for adapter, found in devices.items()},
        quantization_backend=getattr(module, "quantization_backend", None),
    )


def _all_same(values: Iterable[Any]) -> Any:
    """The one value that all have, or "irregular"."""
    first, *others = values
    return first if all(value == first for value in others) else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the adapters of a model as a whole; "irregular" where its layers disagree."""
    tuner = _tuner(model, "get_model_status")
    layers = get_layer_status(model)
    if isinstance(tuner, BaseTuner) and tuner is not model:
        base_type, tuner_type = type(tuner.model).__name__, type(tuner).__name__
        types = {name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in tuner.peft_config.items()}
    else:
        pretrained = any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__)  # not imported to tell
        base_type, tuner_type, types = type(model).__name__ if pretrained else "other", "None", {}
    trainable, total = count_parameters(model)
    merged = {name for layer in layers for name in layer.merged_adapters}
    # A layer need not have every adapter; those that it has must all be merged or all not.
    partly = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    return TunerModelStatus(
        base_model_type=base_type,
        adapter_model_type=tuner_type,
        peft_types=types,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_all_same(layer.enabled for layer in layers),
        active_adapters=_all_same(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={
            name: _all_same(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in dict.fromkeys(n for layer in layers for n in layer.requires_grad)
        },
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())})
            for name in dict.fromkeys(n for layer in layers for n in layer.devices)
        },
        quantization_backend=_all_same(layer.quantization_backend for layer in layers),
    )
