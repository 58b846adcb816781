"""`peft.tuners.lora.eva`."""

from ...init.eva import (
    EvaConfig,
    forward_fn_dict,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)

__all__ = [
    "EvaConfig",
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
]
