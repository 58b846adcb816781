"""`peft.utils`: the names that scripts import from there, from where they live here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..aliases import register
from ..base_state import get_base_model_state_dict, set_base_model_state_dict
from ..config import NoMatchingPeftModuleError, PeftError, PeftType, PeftWarning, TaskType
from ..distributed import fsdp_auto_wrap_policy
from ..init.loftq import replace_lora_weights_loftq
from ..loading import infer_device, load_peft_weights
from ..prepare import cast_mixed_precision_params, prepare_model_for_kbit_training
from ..saved_modules import ModulesToSaveWrapper
from ..state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from ..token_sites import TrainableTokensWrapper
from . import constants
from .constants import *  # noqa: F403 (its __all__)

__all__ = [
    *constants.__all__,
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "transpose",
]
register(__name__, {
    "error": "config", "incremental_pca": "init.incremental_pca", "loftq_utils": "init.loftq", "peft_types": "config",
    "save_and_load": "utils mapping", "warning": "config",
})  # fmt: skip


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight as [out, in], of a layer that stores it [in, out] if `fan_in_fan_out`; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name in the parent) of a module by its name."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def __getattr__(name: str) -> Any:
    """The tables of default targets, which `constants` makes when they are asked for."""
    if name.startswith("TRANSFORMERS_MODELS_TO_"):
        return getattr(constants, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
