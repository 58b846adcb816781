"""Putting adapters into a model, in two phases: a plan that changes nothing, and its commit, which cannot fail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config.base import TargetConfig
from ..config.limits import check_adapter_name
from ..config.targets import (
    ALL_LINEAR,
    Matched,
    check_mamba,
    match_targets,
    minimal_suffixes,
    model_config,
    no_match_error,
    warn_of_difference,
    warn_unmatched,
    warn_unsaved,
)
from ..config.types import SEQ_CLS_HEADS, TaskType
from ..files.checks import PREFIX, TUNER, list_some
from ..files.whole import copied
from ..layer.containers import AdapterDict
from ..layer.layer import AdapterLayer
from ..layer.module_layer import ModuleLayer
from ..layer.saved_modules import ModulesToSaveWrapper, check_savable
from ..layer.shared_tensors import fill_containers, held_containers
from ..methods.base_edit import EDIT
from ..methods.computed import compute
from ..methods.method import Method, State
from ..methods.registry import method_of
from ..methods.tied import warn_tied
from ..methods.whole import WholeMethod
from ..prompts.method import PromptMethod
from ..weights.split import is_split
from .custom import new_layer, with_weight
from .modules import (
    LayerPlan,
    Site,
    adapter_layers,
    base_of,
    checked_info,
    corrected_fan_in_fan_out,
    input_embeddings,
    inside_saved,
    parts,
    set_child,
    walk,
)
from .old_experts import Converted, JoinedExperts, convert_targets, find_joined, without_dropout
from .parameters import parameter_sites
from .place import place
from .replicate import replicate_layers
from .split import split_sites
from .tokens import TokenPlan, plan_tokens


class _SavedPlan(NamedTuple):
    site: Site
    wrapper: ModulesToSaveWrapper
    module: nn.Module


@dataclass
class InjectionPlan:
    """Everything that an adapter needs, made and checked, with the model as it was. `commit` puts it in."""

    model: nn.Module
    config: Any
    adapter: str
    method: Method
    layers: list[LayerPlan]
    saved: list[_SavedPlan]
    tokens: list[TokenPlan]
    shared: State
    changes: dict[str, Any]  # what the configuration says once the adapter is in: targets by name
    leaders: Mapping[str, str]  # modules that share what another has, with its name
    joined: Sequence[JoinedExperts]  # the model's experts, where they were looked for
    finish: Callable[[], None]  # computes what no file holds; a plan for a file needs it before `commit`
    abandon: Callable[[], None] = lambda: None  # takes back the little that planning did to the model
    encoder: nn.Module | None = None  # makes the prompt of a method that has one; the tuner holds it
    _before: dict[str, Any] = field(default_factory=dict)
    _frozen: list[nn.Parameter] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [plan.site.name for plan in self.layers if plan.method is self.method]

    def _placed(self) -> list[tuple[Site, nn.Module]]:
        """The modules that come into the model, each with its site. Layers inside of another module have no parent."""
        placed: list[tuple[Site, nn.Module]] = [(p.site, p.layer) for p in self.layers if p.site.parent is not None]
        placed += [(tokens.outer, tokens.wrapper) for tokens in self.tokens]
        placed += [(saved.site, saved.wrapper) for saved in self.saved]
        return [(site, module) for site, module in placed if module is not site.module]

    def commit(self) -> None:
        """Put the adapter into the model. It is not active yet, and requires no gradients."""
        self._edit_bases()
        held = held_containers(m for _, m in adapter_layers(self.model)) if self.shared else {}
        containers = fill_containers(self.shared, self.adapter, held)
        for plan in self.layers:
            plan.layer.add(self.adapter, plan.method, plan.state, containers)
            plan.layer.set_requires_grad(self.adapter, False)
        for saved in self.saved:
            saved.wrapper.modules_to_save[self.adapter] = saved.module
            saved.wrapper.set_requires_grad(self.adapter, False)
        for site, module in self._placed():
            set_child(site, module)
        self._before = {name: getattr(self.config, name) for name in self.changes}
        vars(self.config).update(self.changes)
        # Layers and copied modules share what they have in common.
        layers = {plan.site.name: plan.layer for plan in self.layers if plan.method is self.method}
        self.method.tie(self.config, self.adapter, layers, _within(layers, self.leaders))
        rows = {tokens.outer.name: tokens.layer for tokens in self.tokens}
        for tokens in self.tokens:
            if tokens.leader is not None:
                tokens.method.tie(None, self.adapter, rows, {tokens.outer.name: tokens.leader})
        copies = {saved.site.name: saved.module for saved in self.saved}
        for name, leader in _within(copies, self.leaders).items():
            copies[name].weight = copies[leader].weight

    def _edit_bases(self) -> None:
        """Change the base weights that the adapter changes: all or, on an error, none."""
        edits = [(plan.layer, plan.state.pop(EDIT)) for plan in self.layers if EDIT in plan.state]
        try:
            for layer, edit in edits:
                layer.edit_base(self.adapter, edit)
        except Exception:
            for layer, _ in edits:
                layer.restore_base(self.adapter)
            raise
        for layer, edit in edits:
            for name in edit.used:
                vars(layer.base_layer).pop(name, None)

    def freeze_base(self) -> None:
        """Stop gradients of everything that is no adapter's; `undo` turns them on again."""
        for site in walk(self.model):
            if isinstance(site.module, AdapterDict) or inside_saved(site):
                continue
            layer = site.module.base_layer if isinstance(site.module, AdapterLayer) else None
            for parameter in site.module.parameters(recurse=False) if layer is None else layer.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen.append(parameter)

    def undo(self) -> None:
        """Take the adapter out again, leaving the model as it was before `commit`."""
        for parameter in self._frozen:  # first: a base weight that comes back takes this over from the one in its place
            parameter.requires_grad_(True)
        for plan in self.layers:
            plan.layer.delete_adapter(self.adapter)
        for saved in self.saved:
            saved.wrapper.delete_adapter(self.adapter)
        for site, _ in self._placed():
            set_child(site, site.module)
        vars(self.config).update(self._before)
        self.abandon()


def plan_injection(
    model: nn.Module, config: Any, adapter_name: str = "default", *, low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = False, loading: bool = False, keys: Sequence[str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> InjectionPlan:  # fmt: skip
    """Work out which layers an adapter goes into, and make its tensors. Raises without having changed anything.

    low_cpu_mem_usage: tensors on the meta device. autocast_adapter_dtype: float32 tensors on half-precision bases.
    loading: a file will fill the tensors; together with low_cpu_mem_usage, nothing is computed before `finish`.
    keys: take the targets from a state dict's keys, not from the configuration. shapes: of the tensors that will fill
    the adapter, where they are known.
    """
    check_adapter_name(adapter_name)
    replication = getattr(config, "layer_replication", None)
    with ExitStack() as undo:  # what planning does to the model is taken back on an error
        if replication:
            undo.callback(replicate_layers(model, replication))
        for _, layer in adapter_layers(model, adapter_name):  # has one of that name, which the new one replaces
            if adapter_name in layer.base_edits and not method_of(config).keeps_edit(config, layer.info):
                undo.callback(layer.set_edits, dict(layer.base_edits))
                layer.restore_base(adapter_name)
        plan = _plan(
            model, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype, loading, keys, shapes or {}
        )
        if not (loading and low_cpu_mem_usage):
            plan.finish()
        plan.abandon = undo.pop_all().close
    return plan


def _plan(
    model: nn.Module, config: Any, adapter_name: str, low_cpu_mem_usage: bool, autocast_adapter_dtype: bool,
    loading: bool, keys: Sequence[str] | None, shapes: Mapping[str, Sequence[int]],
) -> InjectionPlan:  # fmt: skip
    method = method_of(config)
    if not isinstance(config, TargetConfig) and not method.prompts:
        raise TypeError(f"{type(config).__name__} does not act on modules of a model")
    config.check_values()
    method.check_config(config, loading=loading)
    if isinstance(method, PromptMethod):
        return _plan_prompt(model, config, adapter_name, method, low_cpu_mem_usage, loading)
    bias = getattr(config, "bias", "none")
    if bias not in ("none", "all") and not str(bias).endswith("_only"):  # "lora_only" and its kin
        raise NotImplementedError(f"Requested bias: {bias!r}, is not implemented (none, all, <method>_only).")
    sites = {site.name: site for site in walk(model) if site.name and not inside_saved(site)}
    opened = method.open_fields(config, model, model_config(model).get("model_type"))
    opened |= method.fields_in_file(shapes)
    completed = copy.copy(config)
    vars(completed).update(opened)
    joined = find_joined(model) if keys is None and (loading or completed.target_modules) else []
    converted = convert_targets(completed, method, joined, sites) if keys is None else Converted({})
    opened |= converted.changes
    vars(completed).update(opened)
    resolved, matched = resolve_targets(model, completed, method, sites, keys)
    matched.names = [n for n in matched.names if n not in converted.routers]
    leaders = method.followers(resolved, model)
    matched.names.extend(n for n, to in leaders.items() if to in matched.names and n not in matched.names)
    check_mamba(config, model, matched.names)
    if split := split_sites(model, sites, matched.names):
        sites = {**sites, **split}
    named = [sites[name] for name in matched.names]
    if isinstance(method, WholeMethod):
        named = [_whole(site, method, model) for site in named]
    inner = {id(part.module) for site in named for part in parts(site)}  # get the adapter with what they are in
    targets = [s for site in named if id(site.module) not in inner for s in (site, *parts(site))]
    if wanted := getattr(resolved, "target_parameters", None):
        targets += parameter_sites(wanted, sites, matched.names, model._parameters)
    targets = [with_weight(site, config) for site in targets]
    if not targets:
        every = ((name, base_of(site)) for name, site in sites.items())
        raise no_match_error(resolved, matched, (n for n, b in every if b is not None and b.kind in method.kinds))

    infos = [checked_info(site) for site in targets]
    configs = method.layer_config(resolved, [info.name for info in infos])
    saved = _plan_saved(resolved, sites, leaders)
    if loading:
        configs = without_dropout(resolved, configs, infos)
    elif keys is None:
        adapted = [info.name for info in infos]
        warn_unmatched(config, method.patterns.values(), list(sites), adapted, converted.targets)
        warn_unsaved(config, list(sites))
        warn_tied(config, model, {*matched.names, *(site.name for site, _ in saved)})
    for info in infos:
        method.check_layer(configs.get(info.name, resolved), info)
    resolved_fan = corrected_fan_in_fan_out(config, sites, matched.names)
    with torch.device("meta") if low_cpu_mem_usage else nullcontext():
        shared = method.make_shared(resolved, infos)
        compute(shared, low_cpu_mem_usage, later=loading and low_cpu_mem_usage)
        view = SimpleNamespace(**shared)
        states = [method.make_state(configs.get(info.name, resolved), info, view) for info in infos]
        tokens = plan_tokens(model, resolved, sites, matched.names)

    def finish() -> None:
        compute(shared, low_cpu_mem_usage)
        for info, state in zip(infos, states, strict=True):
            compute(state, low_cpu_mem_usage)
            place(state, info, autocast_adapter_dtype and method.autocast)
            if info.base.parallel:
                method.parted(configs.get(info.name, resolved), state, info)
            if shared:  # each layer moves what all share, as in PEFT; a quantised one's arithmetic is not its precision
                dtype = info.dtype if info.quantized is None else torch.float32
                place(shared, replace(info, dtype=dtype), autocast_adapter_dtype and method.autocast)

    for site, state in zip(targets, states, strict=True):
        if EDIT in state and isinstance(site.module, AdapterLayer):
            site.module.check_edit(state[EDIT])
    layers = []
    made: dict[int, AdapterLayer] = {}  # the outermost new layer of a module, for those that several layers go on
    for site, info, state in zip(targets, infos, states, strict=True):
        layer = site.module
        if not isinstance(layer, AdapterLayer):
            below = made.get(id(site.module), site.module)
            layer = new_layer(config, adapter_name, below, info.name, info.base)
            made[id(site.module)] = layer
            layer.train(site.module.training)
        for child in (*shared.values(), *state.values()):
            if isinstance(child, nn.Module):
                child.train(layer.training)
        layers.append(LayerPlan(site, layer, state, method))
    for plan in tokens:
        place(plan.state, plan.layer.info, autocast_adapter_dtype)
    copies = [_SavedPlan(site, wrapper, copied(wrapper.original_module)) for site, wrapper in saved]
    changes = {**opened, "target_modules": resolved.target_modules, **resolved_fan}
    return InjectionPlan(model, config, adapter_name, method, [*layers, *tokens], copies, tokens, shared, changes,
                         leaders, joined, finish)  # fmt: skip


def _whole(site: Site, method: WholeMethod, model: nn.Module) -> Site:
    inner = site.module.base_layer if isinstance(site.module, ModuleLayer) else site.module
    try:
        return replace(site, base=method.base_of(inner, model))
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None


def _plan_prompt(
    model: nn.Module, config: Any, adapter_name: str, method: PromptMethod, low_cpu_mem_usage: bool, loading: bool
) -> InjectionPlan:
    """The plan of a prompt: its encoder, and modules that are trained in full beside it."""
    changes = method.open_fields(config, model, None)
    complete = copy.copy(config)
    vars(complete).update(changes)
    sites = {site.name: site for site in walk(model) if site.name and not inside_saved(site)}
    saved = _plan_saved(complete, sites, {})
    words = input_embeddings(model)
    with torch.device("meta") if low_cpu_mem_usage else nullcontext():
        encoder = method.make_encoder(complete, model, words, loading).train(model.training)
    device = next((p.device for p in (words or model).parameters()), None)
    if not low_cpu_mem_usage and device is not None and device.type != "meta":
        encoder.to(device)
    copies = [_SavedPlan(site, wrapper, copied(wrapper.original_module)) for site, wrapper in saved]
    return InjectionPlan(model, config, adapter_name, method, [], copies, [], {}, changes, {}, [], lambda: None,
                         encoder=encoder)  # fmt: skip


def _within(names: Collection[str], leaders: Mapping[str, str]) -> dict[str, str]:
    return {name: leader for name, leader in leaders.items() if name in names and leader in names}


def resolve_targets(
    model: nn.Module, config: TargetConfig, method: Method, sites: Mapping[str, Site], keys: Sequence[str] | None
) -> tuple[TargetConfig, Matched]:
    """The configuration with explicit targets, and the modules that they select."""
    names = list(sites)
    resolved = copy.copy(config)
    if keys is not None:
        if getattr(config, "target_parameters", None):
            raise ValueError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`, of "
                "which the keys say nothing. Inject it without the state_dict, and load that afterwards."
            )
        layered = (k.removeprefix(PREFIX) for k in keys)
        found = {k.rpartition("." + method.prefix)[0] for k in layered if not k.startswith(TUNER)}
        wanted = found & sites.keys()
        if lost := sorted(n for n in found - wanted if n):
            raise ValueError(f"the state dict names modules that the model lacks: {list_some(lost)}")
        if config.target_modules is None:
            resolved.target_modules = minimal_suffixes(wanted, names)
        else:
            warn_of_difference(resolve_targets(model, config, method, sites, None)[1].names, wanted)
        return resolved, Matched([n for n in names if n in wanted], [])
    targets = config.target_modules
    if not targets and getattr(config, "target_parameters", None):
        return resolved, Matched([], [])
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = set(_all_linear(model, config, sites))
        resolved.target_modules = minimal_suffixes(linear, names)
        matched = match_targets(resolved, names)
        return resolved, Matched([n for n in matched.names if n in linear], matched.excluded)
    if targets is None:
        model_type = model_config(model).get("model_type")
        default = method.default_targets.get(model_type) if model_type else None
        if default is None:
            of = f"models of type {model_type!r}" if model_type else type(model).__name__
            raise ValueError(f"Please specify `target_modules` in `peft_config`: there is no default for {of}.")
        resolved.target_modules = default if isinstance(default, str) else set(default)
    return resolved, match_targets(resolved, names)


def _all_linear(model: nn.Module, config: TargetConfig, sites: Mapping[str, Site]) -> Iterator[str]:
    """Every linear layer but the output embeddings, or the head of a classifier."""
    heads: set[int] = set()
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is not None:
        # another adapter may have copied it, or train rows of it
        heads.update(id(getattr(head, inner, head)) for inner in ("original_module", "token_adapter"))
    elif config.task_type == TaskType.SEQ_CLS:
        heads.update(id(getattr(model, n)) for n in SEQ_CLS_HEADS if getattr(model, n, None) is not None)
    for name, site in sites.items():
        is_linear = (base := base_of(site)) is not None and base.kind == "linear" and not base.transient
        if is_linear and not isinstance(site.parent, nn.MultiheadAttention) and id(site.module) not in heads:
            yield name


def _plan_saved(
    config: Any, sites: Mapping[str, Site], leaders: Mapping[str, str]
) -> list[tuple[Site, ModulesToSaveWrapper]]:
    """The modules that `modules_to_save` names, and those that share a weight with one of them. PEFT matches the end of
    a name, whatever stands before it."""
    ends, within = tuple(config.modules_to_save or ()), (ModulesToSaveWrapper, AdapterDict)
    found = [n for n, s in sites.items() if ends and n.endswith(ends) and not isinstance(s.parent, within)]
    for name in found:
        check_savable(sites[name].module)
        if any(is_split(m) for m in sites[name].module.modules()):
            raise ValueError(f"modules_to_save cannot have {name!r}: tensor parallelism splits it among processes.")
    names = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    names += [n for n, to in leaders.items() if to in names and n not in names]
    held = ((sites[name], sites[name].module) for name in names)
    return [(s, m if isinstance(m, ModulesToSaveWrapper) else ModulesToSaveWrapper(m)) for s, m in held]
