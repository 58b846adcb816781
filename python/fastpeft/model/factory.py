"""Adapters put into a model: with a PeftModel around it, or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config.base import PeftConfig, check_is_config
from ..config.types import warn
from ..methods.registry import method_of
from .peft_model import PeftModel, class_for
from .tasks import PeftMixedModel
from .tuner import tuner_class


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", mixed: bool = False,
    autocast_adapter_dtype: bool = True, revision: str | None = None, low_cpu_mem_usage: bool = False,
) -> PeftModel:  # fmt: skip
    """Put a new adapter into `model`, which is changed in place, and wrap it.

    mixed: give PEFT's PeftMixedModel; any PeftModel here takes adapters of several methods. revision: of the base
    model, noted in the configuration. On an error the model is as it was.
    """
    check_is_config(peft_config)
    new_name = model.__dict__.get("name_or_path") or None
    if peft_config.base_model_name_or_path not in (None, new_name):
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{peft_config.base_model_name_or_path}' to "
            f"'{new_name}'. Please ensure that the correct base model is loaded when loading this checkpoint."
        )
    if getattr(model, "peft_config", None):
        warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before."
        )
    cls: type[PeftModel] = PeftMixedModel if mixed else class_for(peft_config)
    result = cls(
        model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )  # fmt: skip
    peft_config.base_model_name_or_path = new_name
    if revision is not None:
        if (old := peft_config.revision) not in (None, revision):
            warn(f"peft config has already set base model revision to {old}, overwriting with revision {revision}")
        peft_config.revision = revision
    return result


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> nn.Module:  # fmt: skip
    """Put an adapter into `model`, which is changed in place and returned as it is, without a wrapper.

    state_dict: adapt the modules that its keys name (its values are not used) rather than those of the configuration.
    """
    if method_of(peft_config).prompts:
        raise ValueError("`create_and_replace` does not support prompt learning and adaption prompt yet.")
    tuner = tuner_class(method_of(peft_config))(
        model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    tuner.leave_shared_in_model()
    return tuner.model
