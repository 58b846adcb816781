"""Loading an adapter from a file: open, plan, check the header against the plan, read, and fill what that plan made.

Everything is checked before the model is touched; a plan for a file lies on the meta device until then.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.base import PeftConfig
from ..files.checks import PREFIX
from ..inject.plan import InjectionPlan, plan_injection
from .fits import check_fits
from .folder import AdapterSource, load_adapter_file
from .state_dict import IncompatibleKeys, fill, unpacked


@dataclass(frozen=True)
class Loaded:
    """The checked tensors of an adapter file and the plan that they fit. lenient: but for their sizes. is_new: the plan
    is carried out, rather than made for the check of values for an adapter that is there."""

    where: os.PathLike[str]
    plan: InjectionPlan
    tensors: dict[str, Tensor]
    lenient: bool
    is_new: bool

    def fill(self, model: Any, is_trainable: bool) -> IncompatibleKeys:
        """Put the tensors into the adapter, which is in the PeftModel `model`; on an error a new one is taken out.

        With `lenient`, tensors of another size stay as they were made, with a warning.
        """
        name = self.plan.adapter
        try:
            tensors = unpacked(self.plan.joined, model.peft_config[name], self.tensors)
            result = fill(model, name, tensors, self.lenient, self.is_new and not self.lenient, where=self.where)
        except Exception:
            if self.is_new:
                model.base_model.remove(self.plan)
            raise
        if not is_trainable:
            model.eval()
        return result


def plan_loading(
    source: AdapterSource, config: PeftConfig, model: nn.Module, adapter_name: str,
    key_mapping: Mapping[str, str] | None, options: Mapping[str, Any], autocast_adapter_dtype: bool = False,
    is_new: bool = True,
) -> Loaded:  # fmt: skip
    """Plan an adapter of `config` on the base model, check a file's header against it, and read the tensors.

    is_new: carry the plan out later. Else the adapter is in the model already, and the plan is for the check alone.
    """
    header = {_renamed(key, key_mapping): info for key, info in source.tensors.items()}
    lenient = bool(options.get("ignore_mismatched_sizes", False))  # what is passed over starts as for a new adapter
    with warnings.catch_warnings():
        if not is_new:  # they came when the adapter was put in
            warnings.simplefilter("ignore")
        plan = plan_injection(
            model, config, adapter_name, low_cpu_mem_usage=not lenient, loading=True,
            autocast_adapter_dtype=autocast_adapter_dtype, shapes={key: info.shape for key, info in header.items()},
        )  # fmt: skip
    with ExitStack() as undo:
        undo.callback(plan.abandon)
        check_fits(plan, header, source.folder, lenient)
        tensors = {_renamed(key, key_mapping): value for key, value in source.read().items()}
        if is_new:
            undo.pop_all()
    return Loaded(source.folder, plan, tensors, lenient, is_new)


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | None = None, key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The checked tensors of an adapter folder or Hub repository, by their keys in the file.

    device: where to put them; the accelerator by default, if there is one. key_mapping: expressions for keys without
    `base_model.model.`, and what takes the place of what they match. hub: as `PeftModel.from_pretrained`.
    """
    tensors = load_adapter_file(model_id, **hub)[1]
    return {_renamed(k, key_mapping): t.to(device or infer_device()) for k, t in tensors.items()}


def infer_device() -> str:
    """The type of the accelerator that torch sees, "cpu" without one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def _renamed(key: str, key_mapping: Mapping[str, str] | None) -> str:
    prefix = PREFIX if key.startswith(PREFIX) else ""
    key = key.removeprefix(prefix)
    for old, new in (key_mapping or {}).items():
        key = re.sub(old, new, key)
    return prefix + key
