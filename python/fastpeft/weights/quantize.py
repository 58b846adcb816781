"""Turning a model's linear layers into `NF4Linear` and back.

`from_pretrained(folder, quantization_config=nf4_config())` quantises a dense folder while loading.

transformers knows a quantised model by `hf_quantizer`, `is_quantized`, `quantization_method` and
`config.quantization_config`. Ours carries bitsandbytes' `quantization_config`, since that is what the saved bytes are;
its quantizer says that the model can be trained (with an adapter) and saved, and needs no bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from peft_kernels import dequantize_4bit

from . import quantize_plan as plan
from .base import has_base
from .nf4_experts import NF4Experts, is_accelerated, nests, pack, packed_parameters, unpack
from .nf4_linear import NF4Linear
from .quant_embedding import QuantEmbedding
from .quantize_plan import check_format, modules_of, skipped
from .quantize_tables import finish_tables
from .streaming import Streaming

METHOD = "fastpeft_nf4"
_CONVERSIONS = "_fastpeft_conversions"  # of a model with experts in 4 bits: the conversions of its files from before


def quantize_model(
    model: nn.Module, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True,
    skip: Iterable[str] = ("lm_head",), compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] | None = None, experts: bool = False,
) -> nn.Module:  # fmt: skip
    """Replace every `nn.Linear` (and GPT-2's `Conv1D`) of `model`, in place, by an `NF4Linear`; returns the model.

    experts: keep the experts of mixtures in 4 bits too, which transformers has as parameters [experts, ., .] and which
    are most of such a model. Not by default: PEFT with bitsandbytes leaves them dense, and transformers reads no file
    that has them in 4 bits (`load_nf4_model` does). `double_quant` holds for those whose experts have whole blocks of
    256 scales.

    skip: module names, whole or as dotted parts (`lm_head`, `layers.0.mlp`). Layers whose weight is shared with another
    module (a tied output head) stay dense whatever `skip` says, and so do those that transformers quantises in no
    format (`_keep_in_fp32_modules`: `wo` of T5). progress(done, total, name) is called per layer.
    First everything is checked, so that a bad layer leaves the model as it was; then one layer at a time is
    quantised and its dense weight released. A transformers model also gets the `quantization_config` and the attributes
    that Trainer and `save_pretrained` look for. Raises ValueError for unknown types, block sizes and NaN weights.
    """
    check_format(quant_type, blocksize)
    names = skipped(model, skip)
    if not quantize_rest(model, quant_type, blocksize, double_quant, names, compute_dtype, progress, experts):
        raise ValueError(f"quantize_model: no linear layer to quantise in {type(model).__name__} (skip={names})")
    return model


def quantize_rest(
    model: nn.Module, quant_type: str, blocksize: int, double_quant: bool, skip: list[str],
    compute_dtype: torch.dtype | None, progress: Callable[[int, int, str], None] | None, experts: bool,
) -> int:  # fmt: skip
    """`quantize_model` of a model that may have some layers in 4 bits already; how many it quantised. skip: all names
    to pass over."""
    names, kept = plan.linear_layers(model, skip)
    plan.check_layers(model, names)
    packs = _experts(model, skip) if experts else []
    plan.check_experts(model, packs, blocksize)
    _replace(model, names, packs, quant_type, blocksize, double_quant, compute_dtype, progress)
    mark_quantized(model, quant_type, double_quant, compute_dtype, kept, experts)
    return len(names) + len(packs)


def quantized_skeleton(
    model: nn.Module, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True,
    skip: Iterable[str] = ("lm_head",), experts: bool = False,
) -> nn.Module:  # fmt: skip
    """A model on the meta device as `quantize_model` leaves one with values, in place: the same layers in the same
    formats, without values. For what is worked out from shapes. Raises ValueError as `quantize_model` does, but for
    values."""
    check_format(quant_type, blocksize)
    over = skipped(model, skip)
    names, kept = plan.linear_layers(model, over)
    packs = _experts(model, over) if experts else []
    plan.check_blocks(model, packs, blocksize)
    _replace(model, names, packs, quant_type, blocksize, double_quant, None, None)
    mark_quantized(model, quant_type, double_quant, None, kept, experts)
    return model


def _experts(model: nn.Module, skip: list[str]) -> list[tuple[str, str]]:
    """The experts to keep in 4 bits. ValueError where there are none, neither dense nor in 4 bits already."""
    packs = plan.experts(model, skip)
    if not packs and not packed_parameters(model):
        raise ValueError(f"quantize_model: {type(model).__name__} has no dense experts to keep in 4 bits outside of "
                         f"skip={skip}: leave `experts` off")  # fmt: skip
    return packs


def _replace(
    model: nn.Module, names: list[str], packs: list[tuple[str, str]], quant_type: str, blocksize: int,
    double_quant: bool, compute_dtype: torch.dtype | None, progress: Callable[[int, int, str], None] | None,
) -> None:  # fmt: skip
    total = len(names) + len(packs)
    for done, name in enumerate(names, 1):
        layer: Any = model.get_submodule(name)
        new = plan.quantised(layer, layer.weight.detach(), quant_type, blocksize, double_quant, compute_dtype)
        model.set_submodule(name, new)
        del layer
        if progress is not None:
            progress(done, total, name)
    for done, (name, parameter) in enumerate(packs, len(names) + 1):
        module = model.get_submodule(name)
        dense_experts: Any = module._parameters[parameter]
        pack(module, parameter, quant_type, blocksize, double_quant and nests(dense_experts, blocksize))
        del dense_experts
        if progress is not None:
            progress(done, total, f"{name}.{parameter}")


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `NF4Linear` by a dense `nn.Linear`, an embedding in 8 bits by a dense one, and experts in 4 bits
    by dense ones, in place; returns the model. Experts must not be accelerated then (ValueError)."""
    packed: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, NF4Experts)]
    for name, module in packed:
        if is_accelerated(module):
            raise ValueError(f"dequantize_model: {name} is accelerated: call `unaccelerate(model)` first")
    for _, module in packed:
        unpack(module, dtype)
    for name, layer in modules_of(model):
        if isinstance(layer, NF4Linear):
            with torch.device("meta"):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.detach().to(dense.weight.dtype), requires_grad=False)
            model.set_submodule(name, dense.train(layer.training))
        elif isinstance(layer, QuantEmbedding):
            if layer.scale is not None:
                raise ValueError(f"dequantize_model: {name} multiplies its rows by {layer.scale}; no plain table does")
            table = dequantize_4bit(layer.quant_weight(), dtype)
            with torch.device("meta"):
                rows = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
            rows.weight = nn.Parameter(table, requires_grad=False)
            model.set_submodule(name, rows.train(layer.training))
    model.__dict__.pop("save_pretrained", None)  # of embeddings in 8 bits
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method"):
        model.__dict__.pop(name, None)
    conversions = model.__dict__.pop(_CONVERSIONS, None)
    if conversions is not None:
        model.__dict__.pop("_weight_conversions", None)
        model.__dict__.update(conversions)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return model


def from_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace every bitsandbytes `Linear4bit` of `model`, in place, by an `NF4Linear` over the same bytes. Experts that
    bitsandbytes' parametrization keeps stay its own: `accelerate` and adapters read them as they are."""
    for name, layer in modules_of(model):
        if has_base(layer, "Linear4bit", "bitsandbytes"):
            model.set_submodule(name, NF4Linear.from_bnb(layer).train(layer.training))
    return model


@cache
def _transformers_classes() -> tuple[type, type]:
    """transformers' configuration and quantizer of such models, registered on first use."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class NF4Config(QuantizationConfigMixin):
        """Arguments of `quantize_model`, for `from_pretrained(..., quantization_config=...)`.

        embeddings: the tables too, as `quantize_embeddings` does.
        strict: raise AdapterFileError for a tensor that is missing or has another size than the model's, with the name
        of its file; else transformers says of most that they were given random values.
        """

        def __init__(
            self, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True,
            skip: list[str] | None = None, compute_dtype: str | None = None, experts: bool = False,
            strict: bool = False, embeddings: bool = False, **_: Any,
        ) -> None:  # fmt: skip
            self.quant_method: Any = METHOD
            self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
            self.skip = ["lm_head"] if skip is None else list(skip)
            self.compute_dtype, self.experts, self.strict = compute_dtype, experts, strict
            self.embeddings = embeddings

    class NF4Quantizer(HfQuantizer):
        """Quantises while transformers loads, tensor by tensor; afterwards tells it that the model trains and saves."""

        requires_calibration = False
        is_trainable = is_compileable = True
        quantized_element_size = 0.5
        streaming: Streaming | None = None

        def update_device_map(self, device_map: Any) -> Any:
            if isinstance(device_map, dict) and "disk" in device_map.values():
                raise ValueError("nf4_config: a device_map with parts on disk; name devices, or cpu, for all of them")
            return device_map

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
            config: Any = self.quantization_config
            check_format(config.quant_type, config.blocksize)
            self.streaming = Streaming(model, checkpoint_files or [], config)
            return model

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return self.streaming is not None and self.streaming.takes(param_name)

        def get_quantize_ops(self) -> Any:
            return self.streaming

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            config: Any = self.quantization_config
            done = 0 if self.streaming is None else self.streaming.finish()
            self.streaming = None
            dtype = None if config.compute_dtype is None else getattr(torch, config.compute_dtype)
            names = skipped(model, config.skip)
            done += quantize_rest(model, config.quant_type, config.blocksize, config.double_quant, names, dtype, None,
                                  config.experts)  # fmt: skip
            if config.embeddings:
                finish_tables(model)
            if not done:
                raise ValueError(f"nf4_config: no linear layer to quantise in {type(model).__name__} (skip={names})")
            return model

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            model = dequantize_model(model, dtype)
            # transformers removes these itself right after this call
            model.hf_quantizer, model.quantization_method = self, METHOD
            model.config.quantization_config = self.quantization_config
            return model

        def is_serializable(self) -> bool:
            return True

    for cls in (NF4Config, NF4Quantizer):
        cls.__module__, cls.__qualname__ = __name__, cls.__name__
    register_quantization_config(METHOD)(NF4Config)
    register_quantizer(METHOD)(NF4Quantizer)
    return NF4Config, NF4Quantizer


def nf4_config(**arguments: Any) -> Any:
    """A `quantization_config` for `from_pretrained`, with `quantize_model`'s arguments."""
    return _transformers_classes()[0](**arguments)


def __getattr__(name: str) -> Any:  # a pickle of a quantised model looks them up
    if name in ("NF4Config", "NF4Quantizer"):
        return _transformers_classes()[name == "NF4Quantizer"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mark_quantized(
    model: Any, quant_type: str, double_quant: bool, compute_dtype: torch.dtype | None, kept: list[str],
    experts: bool = False,
) -> None:  # fmt: skip
    """Give a transformers model the attributes of a quantised one; any other model is left alone.

    kept: names of linear layers that stay dense. experts: its experts are in 4 bits.
    """
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    # Exact names of what stays dense: left out, transformers guesses them.
    model.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype or model.dtype, llm_int8_skip_modules=kept,
    )  # fmt: skip
    if experts and _CONVERSIONS not in model.__dict__:
        # `save_pretrained` would cut the parameters of all experts into files' tensors of one expert each
        had = {name: value for name, value in model.__dict__.items() if name == "_weight_conversions"}
        model.__dict__.update({_CONVERSIONS: had, "_weight_conversions": []})
    config_cls, quantizer_cls = _transformers_classes()
    config = config_cls(quant_type=quant_type, double_quant=double_quant, skip=kept, experts=experts)
    model.hf_quantizer = quantizer_cls(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    # transformers imports bitsandbytes to count the parameters of a model that says this.
    model.is_loaded_in_4bit = importlib.util.find_spec("bitsandbytes") is not None
