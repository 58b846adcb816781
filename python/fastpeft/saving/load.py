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

from ..config.base import CONFIG_NAME, PeftConfig
from ..files.checks import PREFIX, TUNER
from ..inject.mixture import plan_mixture
from ..inject.modules import adapter_layers
from ..inject.plan import InjectionPlan, plan_injection
from ..methods.method import Method
from ..methods.registry import method_of
from .fits import check_fits
from .folder import AdapterSource, load_adapter_file, open_adapter
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
    if "adapters" in options and hasattr(config, "adapters"):
        config.adapters = dict(options["adapters"])
    with warnings.catch_warnings():
        if not is_new:  # they came when the adapter was put in
            warnings.simplefilter("ignore")
        plan = plan_adapter(
            model, config, adapter_name, source.folder if is_new else None, is_new, low_cpu_mem_usage=not lenient,
            loading=True, autocast_adapter_dtype=autocast_adapter_dtype,
            shapes={key: info.shape for key, info in header.items()},
        )  # fmt: skip
    with ExitStack() as undo:
        undo.callback(plan.abandon)
        check_fits(plan, header, source.folder, lenient)
        tensors = {_renamed(key, key_mapping): value for key, value in source.read().items()}
        if is_new:
            undo.pop_all()
    return Loaded(source.folder, plan, tensors, lenient, is_new)


def plan_adapter(
    model: nn.Module, config: Any, adapter_name: str, beside: Any = None, is_new: bool = True, **options: Any
) -> InjectionPlan:
    """`plan_injection`, also for a method that mixes other adapters: these are put into the model first, and taken out
    again when the plan is abandoned. beside: the folder that the configuration is from, in which they may be, too."""
    method = method_of(config)
    folders = method.mixes(config)
    if folders is None:
        return plan_injection(model, config, adapter_name, **options)
    config.check_values()
    method.check_config(config)
    method.open_fields(config, model, None)
    if not is_new:
        return plan_mixture(model, config, adapter_name)
    with ExitStack() as undo:
        _put_in(model, adapter_name, method, {n: _place(beside, n, f) for n, f in folders.items()}, undo,
                bool(options.get("autocast_adapter_dtype")))  # fmt: skip
        plan = plan_mixture(model, config, adapter_name)
        plan.abandon = undo.pop_all().close
    return plan


def _place(beside: Any, name: str, folder: str) -> Any:
    """The folder of an adapter that is mixed: below the mixture's own, where it was saved along, or its own."""
    here = None if beside is None else beside / name
    if here is None or not (here / CONFIG_NAME).exists():
        return folder
    # PEFT 0.21 puts all sorts of tensors there
    return here if all(key.startswith(PREFIX) for key in open_adapter(here).tensors) else folder


def _put_in(
    model: nn.Module, adapter_name: str, method: Method, folders: Mapping[str, Any], undo: ExitStack, autocast: bool
) -> None:
    """Put the adapters that another mixes into a model without adapters, whose modules are then in evaluation, as
    after PEFT. One that an earlier mixture of that name left there is replaced."""
    sources = {name: open_adapter(folder) for name, folder in folders.items()}
    configs = {name: source.peft_config() for name, source in sources.items()}
    for name, config in configs.items():
        method.check_mixed(name, method_of(config), config)
    before = dict(getattr(model, "peft_config", None) or {})
    if before and (adapter_name not in before or method_of(before[adapter_name]).mixes(before[adapter_name]) is None):
        kinds = f"{method.peft_type.value} and {', '.join(sorted({c.peft_type.value for c in before.values()}))}"
        raise ValueError(f"Cannot combine adapters with different peft types: the model has adapters. Found {kinds}.")
    for _, layer in adapter_layers(model):
        layer._active_adapter = []
        for name in before:
            if name in layer.methods:
                layer.delete_adapter(name)
    undo.callback(_put_back, {module: module.training for module in model.modules()})
    undo.callback(lambda: vars(model).pop("peft_config", None))
    model.eval()
    model.peft_config = configs  # type: ignore[assignment]
    for i, (name, source) in enumerate(sources.items()):
        configs[name].inference_mode = False
        loaded = plan_loading(source, configs[name], model, name, None, {}, autocast)
        undo.callback(loaded.plan.undo)
        loaded.plan.finish()
        loaded.plan.commit()
        if i == 0:
            loaded.plan.freeze_base()
        tensors = unpacked(loaded.plan.joined, configs[name], loaded.tensors)
        fill(model, name, tensors, low_cpu_mem_usage=True, where=source.folder)


def _put_back(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | None = None, key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The checked tensors of an adapter folder or Hub repository, by their keys in the file.

    device: where to put them; the accelerator by default, if there is one. key_mapping: expressions for keys without
    `base_model.model.`, and what takes the place of what the first one matches. hub: as `PeftModel.from_pretrained`.
    """
    tensors = load_adapter_file(model_id, **hub)[1]
    return {_renamed(k, key_mapping): t.to(device or infer_device()) for k, t in tensors.items()}


def infer_device() -> str:
    """The type of the accelerator that torch sees, "cpu" without one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def _renamed(key: str, key_mapping: Mapping[str, str] | None) -> str:
    prefix = next((start for start in (PREFIX, TUNER) if key.startswith(start)), "")
    key = key.removeprefix(prefix)
    for old, new in (key_mapping or {}).items():
        renamed, count = re.subn(old, new, key)
        if count:  # the first that is found is all that counts
            return prefix + renamed
    return prefix + key
