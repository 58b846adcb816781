"""fastpeft: PEFT's interface on fused kernels. `import fastpeft as peft`.

Names are imported when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from .classes import loaded_by as _loaded_by
from .compat import peft_names as _peft_names

__version__ = "0.1.0"

_NAMES = {
    "config": (
        "NoMatchingPeftModuleError", "PeftConfig", "PeftError", "PeftType", "PeftWarning", "TargetConfig", "TaskType",
    ),
    "convert": ("convert_to_lora", "save_as_lora"),
    "base_state": ("get_base_model_state_dict", "set_base_model_state_dict"),
    "weights.load_nf4": ("load_nf4_model",),
    "loading": ("load_peft_weights",),
    "serving": ("export_for_serving", "inspect_adapter"),
    "factory": ("get_peft_model", "inject_adapter_in_model"),
    "tasks": (  # PeftModel from here, so that the classes of all tasks are there for it
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftMixedModel", "PeftModel", "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
    ),
    "auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "state_dict": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "status": ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"),
    "prepare": ("cast_mixed_precision_params", "prepare_model_for_kbit_training"),
    "layer": ("AdapterLayer",),
    "distributed": ("fully_shard_model",),
    "method": ("Method", "register"),
    "compat.peft_only": (
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING", "get_peft_config",
    ),
    "init.corda": ("preprocess_corda",),
    "init.eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "init.loftq": ("replace_lora_weights_loftq",),
    "init.loraga": ("preprocess_loraga",),
    "start.corda": ("CordaConfig",),
    "start.eva": ("EvaConfig",),
    "start.loftq": ("LoftQConfig",),
    "start.loraga": ("LoraGAConfig",),
    "kappa": ("find_kappa_target_modules",),
    "huge_pages": ("use_huge_pages",),
    "methods.lora": ("LoraRuntimeConfig",),
    "weights.nf4_linear": ("NF4Linear",),
    "weights.quantize": ("dequantize_model", "from_bitsandbytes", "nf4_config", "quantize_model"),
    "pool": ("AdapterLoadError", "AdapterPool", "PoolFull"),
}  # fmt: skip
HOMES = {name: home for home, names in _NAMES.items() for name in names}
_LATER = ("AdaptionPrompt", "Arrow", "Cartridge", "CPT", "MultitaskPrompt", "Poly", "Prefix", "Prompt", "Shadow",
          "XLora")  # fmt: skip
_peft_names.install()


_loaded_by(lambda: importlib.import_module(".methods", __name__).load_all())  # type: ignore[no-any-return]


def _of_methods() -> dict[str, Any]:
    """The configuration class and the tuner class of every method, and nested configurations, by PEFT's names."""
    from .method import registry
    from .methods.variants import SUB_CONFIGS
    from .tuner import tuner_class

    methods = registry().values()
    configs = [*(m.config_class for m in methods), *SUB_CONFIGS.values()]
    return {c.__name__: c for c in configs} | {m.model_name: tuner_class(m) for m in methods}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*HOMES, *_of_methods()})
    if name in _peft_names.PATHS:
        return importlib.import_module(f".{name}", __name__)
    if name in HOMES:
        value = getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
    else:
        value = _of_methods().get(name) if name.endswith(("Config", "Model")) else None
    if value is None:
        later = " (prompt learning, X-LoRA, Poly, Arrow and Shadow are not there yet)" * name.startswith(_LATER)
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}{later}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
