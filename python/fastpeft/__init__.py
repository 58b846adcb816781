"""fastpeft: PEFT's interface on fused kernels. `import fastpeft as peft`.

Names are imported when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from .compat import peft_names as _peft_names
from .config.base import loaders as _loaders

__version__ = "0.1.0"

_NAMES = {
    "files.atomic": ("atomic_directory", "atomic_file", "newest_valid", "remove_leftovers"),
    "files.checks": ("AdapterFileError",),
    "files.gguf_report": ("inspect_gguf",),
    "files.write_errors": ("WriteError", "named_write_errors"),
    "config.base": ("CONFIG_NAME", "PeftConfig", "PromptLearningConfig", "TargetConfig"),
    "config.limits": ("check_adapter_name",),
    "config.types": ("NoMatchingPeftModuleError", "PeftError", "PeftType", "PeftWarning", "TaskType"),
    "weights.cached": ("load_cached_model",),
    "weights.gguf_config": ("gguf_config",),
    "weights.load_gguf": ("load_gguf_model",),
    "weights.load_nf4": ("load_nf4_model",),
    "weights.nf4_linear": ("NF4Linear",),
    "weights.quantize": (
        "dequantize_model", "from_bitsandbytes", "nf4_config", "quantize_model", "quantized_skeleton",
    ),
    "weights.quantize_tables": ("quantize_embeddings",),
    "methods.lora.lora": ("LoraRuntimeConfig",),
    "methods.lora.start.corda": ("CordaConfig",),
    "methods.lora.start.eva": ("EvaConfig",),
    "methods.lora.start.loftq": ("LoftQConfig",),
    "methods.lora.start.loraga": ("LoraGAConfig",),
    "methods.method": ("Method",),
    "methods.registry": ("method_of", "register"),
    "layer.layer": ("AdapterLayer",),
    "inject.modules": ("adapter_modules",),
    "saving.base_state": ("get_base_model_state_dict", "set_base_model_state_dict"),
    "saving.export": ("export_for_serving", "inspect_adapter"),
    "saving.folder": ("convert_bin",),
    "saving.gguf_lora": ("export_gguf_lora",),
    "saving.gguf_merged": ("MERGED_GGUF_TYPES", "needs_dense_merge", "save_merged_gguf"),
    "saving.load": ("load_peft_weights",),
    "saving.state_dict": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "model.auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "model.distributed": ("fully_shard_model",),
    "model.factory": ("get_peft_model", "inject_adapter_in_model"),
    "model.prepare": ("cast_mixed_precision_params", "prepare_model_for_kbit_training"),
    "model.prompted": ("shift_tokens_right",),
    "model.status": ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"),
    "model.tasks": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftMixedModel", "PeftModel", "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
    ),
    "recipes.cartridge": (
        "compose_cartridge_adapters", "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ),
    "recipes.accelerate": ("accelerate", "unaccelerate"),
    "recipes.arrow": ("create_arrow_model",),
    "recipes.checkpointing": ("checkpoint_layers",),
    "recipes.chunked_loss": ("chunked_cross_entropy", "cross_entropy_by_rows"),
    "recipes.convert": ("convert_to_lora", "save_as_lora"),
    "recipes.corda": ("preprocess_corda",),
    "recipes.eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "recipes.kappa": ("find_kappa_target_modules",),
    "families.switch": ("use_huge_pages",),
    "recipes.loftq": ("replace_lora_weights_loftq",),
    "recipes.loraga": ("preprocess_loraga",),
    "recipes.offload_activations": ("OffloadActivations", "offload_activations"),
    "recipes.optimizers.adamw": ("AdamW",),
    "compat.patch.patching": ("patch", "unpatch"),
    "pool": ("AdapterLoadError", "AdapterPool", "PoolFull"),
    "prompts.cartridge": ("CartridgeConfig", "CartridgeEncoder"),
    "prompts.cpt": ("CPTConfig", "CPTEmbedding"),
    "prompts.multitask_prompt_tuning": (
        "MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit",
    ),
    "prompts.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "prompts.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "prompts.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "compat.stand_in": ("as_peft",),
    "compat.peft_only": (
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING", "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "get_peft_config",
    ),
}  # fmt: skip
HOMES = {name: home for home, names in _NAMES.items() for name in names}
_peft_names.install()


def _load() -> None:
    registry = importlib.import_module(".methods.registry", __name__)
    registry.load_all()
    registry.load_room(f"{__name__}.prompts")


_loaders.append(_load)


def _of_methods() -> dict[str, Any]:
    """The configuration class and the tuner class of every method, and nested configurations, by PEFT's names."""
    from .methods.lora.variants import SUB_CONFIGS
    from .methods.registry import registry
    from .model.tuner import tuner_class

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
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
