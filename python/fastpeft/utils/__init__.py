"""`peft.utils`: the names that scripts import from there, from where they live here."""

from ..checkpoint import PICKLE_NAME as WEIGHTS_NAME
from ..checkpoint import SAFETENSORS_NAME as SAFETENSORS_WEIGHTS_NAME
from ..checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from ..config import CONFIG_NAME, PeftType, TaskType
from ..prepare import cast_mixed_precision_params, prepare_model_for_kbit_training
from ..saved_modules import ModulesToSaveWrapper
from ..targets import DEFAULT_TARGETS as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "cast_mixed_precision_params",
    "get_peft_model_state_dict",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
