"""Putting adapters into a model, in two phases: a plan that changes nothing, and its commit, which cannot fail."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import TargetConfig, TaskType
from .containers import AdapterDict
from .layer import AdapterLayer
from .method import LayerInfo, Method, State, method_of, target_config
from .safety import check_adapter_name, list_some
from .saved_modules import ModulesToSaveWrapper, check_savable, copy_module
from .sites import (
    Site,
    checked_info,
    corrected_fan_in_fan_out,
    info_of,
    inside_saved,
    model_config,
    original_of,
    set_child,
    walk,
    wrapper_of,
)  # fmt: skip
from .targets import ALL_LINEAR, Matched, match_targets, minimal_suffixes, no_match_error

LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
SEQ_CLS_HEADS = ("score", "classifier")


@dataclass
class _LayerPlan:
    site: Site
    layer: AdapterLayer
    state: State

    @property
    def is_new(self) -> bool:
        return self.layer is not self.site.module


@dataclass
class _SavedPlan:
    site: Site
    wrapper: ModulesToSaveWrapper
    module: nn.Module


@dataclass
class InjectionPlan:
    """Everything that an adapter needs, made and checked, with the model as it was. `commit` puts it in."""

    model: nn.Module
    config: TargetConfig
    adapter: str
    method: Method
    layers: list[_LayerPlan]
    saved: list[_SavedPlan]
    shared: State
    shared_view: SharedView | None
    changes: dict[str, Any]  # what the configuration says once the adapter is in: targets by name
    _before: dict[str, Any] = field(default_factory=dict)
    _frozen: list[nn.Parameter] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [plan.site.name for plan in self.layers]

    def commit(self) -> None:
        """Put the adapter into the model. It is not active yet, and requires no gradients."""
        for plan in self.layers:
            plan.layer.add(self.adapter, self.method, plan.state, self.shared_view)
            plan.layer.set_requires_grad(self.adapter, False)
            if plan.is_new:
                set_child(plan.site, plan.layer)
        for saved in self.saved:
            saved.wrapper.add(self.adapter, saved.module)
            saved.wrapper.set_requires_grad(self.adapter, False)
            if saved.wrapper is not saved.site.module:
                set_child(saved.site, saved.wrapper)
        self._before = {name: getattr(self.config, name) for name in self.changes}
        vars(self.config).update(self.changes)

    def freeze_base(self) -> None:
        """Stop gradients of everything that is no adapter's; `undo` turns them on again."""
        for site in walk(self.model):
            if isinstance(site.module, AdapterDict):
                continue
            base = site.module.base_layer if isinstance(site.module, AdapterLayer) else site.module
            recurse = isinstance(site.module, AdapterLayer)
            for parameter in base.parameters(recurse=recurse):
                if parameter.requires_grad and not inside_saved(site):
                    parameter.requires_grad_(False)
                    self._frozen.append(parameter)

    def undo(self) -> None:
        """Take the adapter out again, leaving the model as it was before `commit`."""
        for plan in self.layers:
            plan.layer.delete_adapter(self.adapter)
            if plan.is_new:
                set_child(plan.site, plan.site.module)
        for saved in self.saved:
            saved.wrapper.delete_adapter(self.adapter)
            if saved.wrapper is not saved.site.module:
                set_child(saved.site, saved.site.module)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        vars(self.config).update(self._before)


def plan_injection(
    model: nn.Module,
    config: Any,
    adapter_name: str = "default",
    *,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = False,
    loading: bool = False,
    keys: Sequence[str] | None = None,
) -> InjectionPlan:
    """Work out which layers an adapter goes into, and make its tensors. Raises without having changed anything.

    low_cpu_mem_usage: tensors on the meta device. autocast_adapter_dtype: float32 tensors on half-precision bases.
    loading: a file will fill the tensors. keys: take the targets from a state dict's keys, not from the configuration.
    """
    check_adapter_name(adapter_name)
    config = target_config(config)
    method = method_of(config)
    method.check_config(config, loading=loading)
    sites = {site.name: site for site in walk(model) if site.name and not inside_saved(site)}
    resolved, matched = _resolve(model, config, method, sites, keys)
    if not matched.names:
        every = ((name, info_of(site)) for name, site in sites.items())
        raise no_match_error(resolved, matched, (n for n, i in every if i is not None and i.kind in method.kinds))

    infos = [checked_info(sites[name]) for name in matched.names]
    configs = method.layer_config(config, matched.names)
    for info in infos:
        method.check_layer(configs.get(info.name, config), info)
    resolved_fan = corrected_fan_in_fan_out(config, sites, matched.names)
    saved = _plan_saved(model, config, sites)

    with torch.device("meta") if low_cpu_mem_usage else nullcontext():
        shared = method.make_shared(config, infos)
        view = SharedView(shared) if shared else None
        states = [method.make_state(configs.get(info.name, config), info, view) for info in infos]
    for info, state in zip(infos, states, strict=True):
        _place(state, info, autocast_adapter_dtype)
    layers = []
    for info, state in zip(infos, states, strict=True):
        site = sites[info.name]
        layer = site.module if isinstance(site.module, AdapterLayer) else AdapterLayer(site.module, info.name)
        if site.module is not layer:
            layer.train(site.module.training)
            for child in state.values():
                if isinstance(child, nn.Module):
                    child.train(site.module.training)
        layers.append(_LayerPlan(site, layer, state))
    plans = [_SavedPlan(site, wrapper_of(site), copy_module(original_of(site))) for site in saved]
    changes = {"target_modules": resolved.target_modules, **resolved_fan}
    return InjectionPlan(model, config, adapter_name, method, layers, plans, shared, view, changes)


class SharedView:
    """The tensors that all layers of an adapter share, by name, wherever they live."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = dict(tensors)
        self._containers: dict[str, AdapterDict] | None = None
        self._adapter = ""

    def bind(self, containers: dict[str, AdapterDict], adapter: str) -> None:
        """Read from containers from now on: the tuner's, which move with the model."""
        self._containers, self._adapter = containers, adapter

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._containers is not None:
            return self._containers[name][self._adapter]
        return self._tensors[name]


def _resolve(
    model: nn.Module, config: TargetConfig, method: Method, sites: Mapping[str, Site], keys: Sequence[str] | None
) -> tuple[TargetConfig, Matched]:
    """The configuration with explicit targets, and the modules that they select."""
    names = list(sites)
    resolved = copy.copy(config)
    if keys is not None:
        found = {key.removeprefix("base_model.model.").rpartition("." + method.prefix)[0] for key in keys}
        wanted = {n for n in found if n in sites}
        lost = sorted(n for n in found - wanted if n)
        if lost:
            raise ValueError(f"the state dict names modules that the model lacks: {list_some(lost)}")
        if config.target_modules is None:
            resolved.target_modules = minimal_suffixes(wanted, names)
        return resolved, Matched([n for n in names if n in wanted], [])
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = set(_all_linear(model, config, sites))
        resolved.target_modules = minimal_suffixes(linear, names)
        matched = match_targets(resolved, names)
        return resolved, Matched([n for n in matched.names if n in linear], matched.excluded)
    if targets is None:
        model_type = model_config(model).get("model_type")
        default = method.default_targets.get(model_type) if model_type else None
        if default is None:
            raise ValueError(
                f"Please specify `target_modules` in `peft_config`: there is no default for "
                f"{f'models of type {model_type!r}' if model_type else type(model).__name__}."
            )
        resolved.target_modules = default if isinstance(default, str) else set(default)
    return resolved, match_targets(resolved, names)


def _all_linear(model: nn.Module, config: TargetConfig, sites: Mapping[str, Site]) -> Iterator[str]:
    """Every linear layer but the output embeddings, or the head of a classifier."""
    heads: set[int] = set()
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is not None:
        heads.add(id(head))
    elif config.task_type == TaskType.SEQ_CLS:
        heads.update(id(getattr(model, n)) for n in SEQ_CLS_HEADS if getattr(model, n, None) is not None)
    for name, site in sites.items():
        info = info_of(site)
        if info is not None and info.kind == "linear" and id(site.module) not in heads:
            yield name


def _plan_saved(model: nn.Module, config: TargetConfig, sites: Mapping[str, Site]) -> list[Site]:
    """The modules that `modules_to_save` names; PEFT matches the end of a name, whatever stands before it."""
    ends = tuple(config.modules_to_save or ())
    found = []
    for name, site in sites.items() if ends else ():
        if name.endswith(ends) and not (isinstance(site.parent, (ModulesToSaveWrapper, AdapterDict))):
            check_savable(original_of(site))
            found.append(site)
    inner = {s.name for s in found}
    return [s for s in found if not any(s.name.startswith(other + ".") for other in inner)]


def _place(state: State, info: LayerInfo, autocast: bool) -> None:
    """Move new tensors to their layer's device and dtype, as PEFT does; float32 for half precision if asked."""
    for name, value in state.items():
        if not isinstance(value, (nn.Module, Tensor)):
            continue
        holder = AdapterDict({"x": value})
        tensors = [*holder.parameters(), *holder.buffers()]
        if not tensors or any(t.is_meta for t in tensors):
            dtype, device = info.dtype if info.dtype.is_floating_point else None, None
        else:
            dtype, device = info.dtype if info.dtype.is_floating_point else None, info.device
        if device is not None and device.type == "meta":
            device = None
        holder.to_entry("x", device, dtype)
        if autocast and dtype in LOW_PRECISION:
            holder.to_entry("x", None, torch.float32)
        state[name] = holder["x"]
