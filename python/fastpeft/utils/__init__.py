"""`peft.utils`: the names that scripts import from there, from where they live here."""

from typing import Any

from ..checkpoint import PICKLE_NAME as WEIGHTS_NAME
from ..checkpoint import SAFETENSORS_NAME as SAFETENSORS_WEIGHTS_NAME
from ..checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from ..config import CONFIG_NAME, PeftType, TaskType
from ..init.loftq import replace_lora_weights_loftq
from ..method import registry
from ..prepare import cast_mixed_precision_params, prepare_model_for_kbit_training
from ..saved_modules import ModulesToSaveWrapper
from ..targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..token_sites import TrainableTokensWrapper

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "TrainableTokensWrapper",
    "cast_mixed_precision_params",
    "get_peft_model_state_dict",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    """`TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`: a method's default targets by model type."""
    start, end = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"
    if name.startswith(start) and name.endswith(end):
        wanted = name.removeprefix(start).removesuffix(end)
        for kind, method in registry().items():
            if kind.value.replace("_", "") == wanted:
                return dict(method.default_targets)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
