"""`peft.utils.other`."""

from . import CONFIG_NAME, ModulesToSaveWrapper, cast_mixed_precision_params, prepare_model_for_kbit_training

__all__ = ["CONFIG_NAME", "ModulesToSaveWrapper", "cast_mixed_precision_params", "prepare_model_for_kbit_training"]
