"""4-bit models and transformers: the attributes that a quantised model carries.

transformers knows a quantised model by `hf_quantizer`, `is_quantized`, `quantization_method` and
`config.quantization_config`. Ours carries bitsandbytes' `quantization_config`, since that is what the saved bytes are;
its quantizer says that the model can be trained (with an adapter) and saved, and needs no bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

METHOD = "fastpeft_nf4"
_MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method")


@cache
def make_classes(home: str, quantize: Callable[..., Any], dequantize: Callable[..., Any]) -> tuple[type, type]:
    """The configuration and quantizer classes, registered with transformers on first use.

    home: the module that has them as attributes, so that a model that carries them pickles. quantize, dequantize: of a
    model, in place.
    """
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class NF4Config(QuantizationConfigMixin):
        """Arguments of `quantize_model`, for `from_pretrained(..., quantization_config=...)`."""

        def __init__(
            self, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True,
            skip: list[str] | None = None, compute_dtype: str | None = None, **_: Any,
        ) -> None:  # fmt: skip
            self.quant_method: Any = METHOD
            self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
            self.skip = ["lm_head"] if skip is None else list(skip)
            self.compute_dtype = compute_dtype

    class NF4Quantizer(HfQuantizer):
        """Quantises after loading; afterwards tells transformers that the model trains and saves."""

        requires_calibration = False
        is_trainable = is_compileable = True

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            config: Any = self.quantization_config
            dtype = None if config.compute_dtype is None else getattr(torch, config.compute_dtype)
            return quantize(model, config.quant_type, config.blocksize, config.double_quant, config.skip, dtype)

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            model = dequantize(model, dtype)
            # transformers removes these itself right after this call
            model.hf_quantizer, model.quantization_method = self, METHOD
            model.config.quantization_config = self.quantization_config
            return model

        def is_serializable(self) -> bool:
            return True

    for cls in (NF4Config, NF4Quantizer):
        cls.__module__, cls.__qualname__ = home, cls.__name__
    register_quantization_config(METHOD)(NF4Config)
    register_quantizer(METHOD)(NF4Quantizer)
    return NF4Config, NF4Quantizer


def mark_quantized(
    model: Any, classes: Callable[[], tuple[type, type]], quant_type: str, double_quant: bool,
    compute_dtype: torch.dtype | None, kept: list[str],
) -> None:  # fmt: skip
    """Give a transformers model the attributes of a quantised one; any other model is left alone.

    classes: gives those of `make_classes`. kept: names of linear layers that stay dense.
    """
    if "transformers" not in sys.modules or not isinstance(model, sys.modules["transformers"].PreTrainedModel):
        return
    from transformers import BitsAndBytesConfig

    bnb_config: Any = BitsAndBytesConfig
    model.config.quantization_config = bnb_config(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype or model.dtype,
        # Exact names: left out, transformers guesses which layers are dense.
        llm_int8_skip_modules=kept,
    )
    config_cls, quantizer_cls = classes()
    config = config_cls(quant_type=quant_type, double_quant=double_quant, skip=kept)
    model.hf_quantizer = quantizer_cls(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    # transformers imports bitsandbytes to count the parameters of a model that says this.
    model.is_loaded_in_4bit = importlib.util.find_spec("bitsandbytes") is not None


def unmark_quantized(model: Any) -> None:
    """Undo `mark_quantized`."""
    for name in _MARKS:
        model.__dict__.pop(name, None)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
