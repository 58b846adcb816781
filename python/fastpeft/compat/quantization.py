"""PEFT's `utils.quantization_utils`: what a layer is quantised by, its weight and a new one; and the settings of
quantised models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import util
from typing import Any

from torch import Tensor, nn

from ..layer.layer import AdapterLayer
from ..weights.find import weight_of


class QuantizationBackend:
    """The form of a quantised layer's weight. supports_merge: true where a weight can be stored in it."""

    layer_type = "linear"
    supports_merge: bool = False
    backend_name: str = ""

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The weight of a layer, dense in float32; TypeError of a layer that has none."""
        base = weight_of(base_layer)
        if base is None:
            raise TypeError(f"{type(base_layer).__name__} has no weight of a layer that adapters act on")
        return base.read()[0].detach()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantise a weight into the base layer of an adapter layer; TypeError where that cannot be."""
        if not self.supports_merge:
            raise TypeError(f"Requantization is not supported for {self.backend_name} layers.")
        base: Any = weight_of(peft_layer.get_base_layer())
        base.write(weight_data, None)
        if isinstance(peft_layer, AdapterLayer):
            peft_layer.changed()

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        """An output of the base layer that may be written to."""
        return x


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A form that no weight can be stored in."""

    def __init__(self, backend_name: str = "") -> None:
        self.backend_name = backend_name


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes' Linear8bitLt."""

    supports_merge, backend_name = True, "bnb 8bit"


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes' Linear4bit."""

    supports_merge, backend_name = True, "bnb 4bit"

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        return x.clone()


class HqqBackend(QuantizationBackend):
    """HQQLinear."""

    supports_merge, backend_name = True, "hqq"


class TorchaoBackend(QuantizationBackend):
    """torchao's tensors, which tell their own settings: PEFT's `get_apply_tensor_subclass` is kept and not asked."""

    supports_merge, backend_name = True, "torchao"

    def __init__(self, get_apply_tensor_subclass: Callable[[], Any] | None = None) -> None:
        self.get_apply_tensor_subclass = get_apply_tensor_subclass


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The form of a base layer's weight; None where it is dense. kwargs: `get_apply_tensor_subclass`, of torchao."""
    base = weight_of(base_layer)
    if base is None or base.quantized is None:
        return None
    if base.quantized == "torchao":
        return TorchaoBackend(kwargs.get("get_apply_tensor_subclass"))
    for backend in (Bnb8bitBackend, Bnb4bitBackend, HqqBackend):
        if backend.backend_name == base.quantized:
            return backend()
    found = ForwardOnlyQuantizationBackend(base.quantized)
    found.supports_merge = base.refusal is None
    return found


def quantization_extra_repr(module: nn.Module) -> str:
    """The text between a module's brackets, with the name of its quantiser."""
    base, backend = nn.Module.extra_repr(module), getattr(module, "quantization_backend", None)
    own = f"quantization_backend={getattr(backend, 'backend_name', backend)!r}" if backend else ""
    return ", ".join(part for part in (base, own) if part)


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """Settings that PEFT hands to a model's quantised layers: torchao's `get_apply_tensor_subclass`, or nothing."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    name = "get_apply_tensor_subclass"
    return {name: getattr(config, name)} if hasattr(config, name) else {}


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The quantisation settings of a transformers model that was quantised by `method`; None for others."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    return settings if getattr(model, "quantization_method", None) == method else None


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> Any:
    """The class of layers that gptqmodel would choose for settings of GPTQ; None without settings or gptqmodel."""
    config = gptq_quantization_config
    if config is None or util.find_spec("gptqmodel") is None:
        return None
    importer: Any = importlib.import_module("gptqmodel.utils.importer")
    gptqmodel: Any = importlib.import_module("gptqmodel")
    quantization: Any = importlib.import_module("gptqmodel.quantization")
    return importer.hf_select_quant_linear_v2(
        bits=config.bits, group_size=config.group_size, desc_act=config.desc_act, sym=config.sym, device_map=device_map,
        format=getattr(config, "checkpoint_format", "gptq"), quant_method=quantization.METHOD.GPTQ,
        meta=getattr(config, "meta", None), pack=False, backend=gptqmodel.BACKEND.AUTO_TRAINABLE,
    )  # fmt: skip
