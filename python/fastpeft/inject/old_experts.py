"""Mixtures of experts whose modules became one parameter.

In transformers 4 each expert's projections were modules (`experts.3.w1`); in 5 a layer's experts, and some projections
of each, are joined in one parameter (`experts.gate_up_proj` [experts, out, in]), and the router is no linear layer any
more. Targets and files with the old names go on working, as in PEFT: a target becomes a `target_parameters` entry, with
the summed rank where projections are joined, and the tensors of a file are laid together. What the old names were is
read from transformers' own conversion of checkpoints.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.base import TargetConfig
from ..config.patterns import first_match
from ..config.targets import ALL_LINEAR, match_targets, minimal_suffixes, select
from ..config.types import PeftError, PeftType, warn
from ..files.checks import PREFIX, KeyMismatchError, list_some
from ..methods.method import Method
from ..weights.base import LayerInfo, innermost
from ..weights.find import weight_of
from ..weights.parameters_4bit import parameters_of
from .modules import Site, walk


@dataclass(frozen=True)
class JoinedExperts:
    """One layer's experts. name: of their module; old: its name in transformers 4. count: of experts. projections: by
    parameter, in the module's order, the old modules that it holds, in the order of its rows. router: the name of the
    router's module, if its weight is a parameter that nothing wraps; old_router: its name in transformers 4."""

    name: str
    old: str
    count: int
    projections: dict[str, list[str]]
    router: str | None
    old_router: str | None


def _old_names(joined: Iterable[JoinedExperts]) -> dict[str, tuple[str, str, int | None]]:
    """(parameter, old module, number of the expert or None for all) by every name that stands for it."""
    names: dict[str, tuple[str, str, int | None]] = {}
    for s in joined:
        for parameter, old in ((f"{s.name}.{p}", old) for p, olds in s.projections.items() for old in olds):
            for root in (s.name, s.old):
                names |= {f"{root}.{i}.{old}": (parameter, old, i) for i in range(s.count)}
                names[f"{root}.{old}"] = (parameter, old, None)
        if s.router is not None and s.old_router is not None:
            names[s.router] = names[s.old_router] = (f"{s.router}.weight", "", None)
    return names


def find_joined(model: nn.Module) -> list[JoinedExperts]:
    """The experts of a transformers model that its checkpoints hold, or held, as modules."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    sites = [site for site in walk(model) if not site.name.endswith(".base_layer")]
    three_d = [site for site in sites if any(p is not None and p.dim() == 3 for p in _own(site).values())]
    if not three_d or not hasattr(getattr(model, "config", None), "model_type"):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions: dict[str, list[str]] = {}
    renamed: list[tuple[str, str]] = []
    for conversion in get_model_conversion_mapping(model):  # type: ignore[arg-type]
        sources, targets = conversion.source_patterns, conversion.target_patterns
        if not hasattr(conversion, "operations"):
            if all(re.fullmatch(r"[\w.\\]+", p) for p in (*sources[:1], *targets[:1])) and len(sources) == 1:
                renamed.append((_plain(sources[0]), _plain(targets[0])))
            continue
        steps = [type(o).__name__ for o in conversion.operations]
        concatenated = all(o.dim == 1 for o in conversion.operations[1:] if hasattr(o, "dim"))
        if steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and concatenated and len(targets) == 1:
            conversions[_plain(targets[0])] = [_plain(s).rpartition("*.")[2].removesuffix(".weight") for s in sources]
    found = []
    for site in three_d:
        projections, count = {}, 0
        for parameter, value in _own(site).items():
            ends = [end for end in conversions if f".{site.name}.{parameter}".endswith(f".{end}")]
            if value is not None and value.dim() == 3 and ends:
                projections[parameter], count = conversions[ends[0]], len(value)
        if projections:
            siblings = [s for s in sites if s.parent is site.parent and _is_router(s, count)]
            router = siblings[0].name if siblings else None
            old, old_router = (name and _old_name(name, renamed) for name in (site.name, router))
            found.append(JoinedExperts(site.name, old or site.name, count, projections, router, old_router))
    return found


def _own(site: Site) -> dict[str, Tensor | None]:
    return parameters_of(innermost(site.module))


def _plain(pattern: str) -> str:
    return pattern.replace("\\", "").strip("^$.")


def _is_router(site: Site, count: int) -> bool:
    module, own = innermost(site.module), _own(site)
    weight = own.get("weight")
    return weight_of(module) is None and weight is not None and weight.dim() == 2 and len(weight) == count


def _old_name(name: str, renamed: Iterable[tuple[str, str]]) -> str:
    for old, new in renamed:
        if f".{new}." in f".{name}.":
            return f".{name}.".replace(f".{new}.", f".{old}.").strip(".")
    return name


@dataclass(frozen=True)
class Converted:
    """Fields that a configuration has instead; the modules that are routers; and the targets that stood for experts."""

    changes: dict[str, Any]
    routers: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset()


def convert_targets(
    config: TargetConfig, method: Method, joined: Sequence[JoinedExperts], sites: Mapping[str, Site]
) -> Converted:
    """Turn targets that were modules of experts into parameters.

    A method that cannot adapt experts leaves them out, with a warning that names them. Raises PeftError where only a
    part of the experts is meant.
    """
    targets = config.target_modules
    names = _old_names(joined)
    if not names or not targets:
        return Converted({})
    probe = copy.copy(config)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        probe.target_modules = list(names)
    hits: dict[str, dict[str, set[int | None]]] = {}
    for name in match_targets(probe, list(names)).names:
        parameter, old, expert = names[name]
        hits.setdefault(parameter, {}).setdefault(old, set()).add(expert)
    routers = {f"{s.router}.weight": s.router for s in joined if s.router is not None}
    if not hits:
        return Converted({})
    listed = [targets] if isinstance(targets, str) else sorted(targets)
    meant = frozenset(t for t in listed if t == ALL_LINEAR or select(t if t is targets else [t], [*names]))
    if "experts" not in method.kinds:
        if left := sorted(p for p in hits if p not in routers):
            shown = targets if isinstance(targets, str) else listed
            message = f"{method.peft_type.value} cannot adapt joined experts, which the targets {shown} mean too: "
            warn(f"{message}{list_some(left)} are left out.", level=3)
        return Converted({}, targets=meant)
    for s in joined:
        for parameter, olds in s.projections.items():
            _check_whole(f"{s.name}.{parameter}", olds, s.count, hits.get(f"{s.name}.{parameter}", {}))
    every = [f"{n}.{p}" for n, s in sites.items() if not n.endswith(".base_layer") for p in _own(s)]
    given = list(getattr(config, "target_parameters", None) or [])
    there = select(given, every)
    new = [p for p in hits if p not in there]
    changes: dict[str, Any] = {"target_parameters": sorted({*given, *minimal_suffixes(new, every)})}
    changes |= _patterns(config, joined, new, every)
    if not isinstance(targets, str):
        modules = [n for n, s in sites.items() if n not in routers.values() and weight_of(innermost(s.module))]
        changes["target_modules"] = {t for t in targets if t not in meant or select([t], modules)}
    elif targets.lower() != ALL_LINEAR:  # an expression that means experts too is read once, as PEFT reads it
        found = [n for n in match_targets(config, [*sites]).names if n not in routers.values()]
        changes["target_modules"] = minimal_suffixes(found, sites)
    return Converted(changes, frozenset(r for p, r in routers.items() if p in hits), meant)


def _check_whole(parameter: str, olds: Sequence[str], count: int, hits: Mapping[str, set[int | None]]) -> None:
    for old, experts in hits.items():
        if None not in experts and len(experts) < count:
            raise PeftError(
                f"target_modules selects {old!r} of {len(experts)} of the {count} experts of {parameter!r}, which are "
                "one parameter now: select all of them or none."
            )
    missing = [old for old in olds if old not in hits]
    if hits and missing:
        raise PeftError(
            f"target_modules selects {', '.join(sorted(hits))} without {', '.join(missing)}, and {parameter!r} holds "
            f"both: select all of them or none. Cannot convert PEFT target(s) {', '.join(sorted(hits))} without also "
            f"targeting {', '.join(missing)} because they are fused into {parameter.rpartition('.')[2]}."
        )


def _patterns(config: Any, joined: Iterable[JoinedExperts], new: Sequence[str], every: Sequence[str]) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` under which each of the joined parameters `new` has the sum of its
    projections' ranks, and the scaling that each of them had."""
    projections = {  # the old names of each expert's modules in a parameter
        f"{s.name}.{p}": [[f"{s.old}.{i}.{old}" for old in olds] for i in range(s.count)]
        for s in joined for p, olds in s.projections.items() if f"{s.name}.{p}" in new
    }  # fmt: skip
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    names = [*projections, *(n for experts in projections.values() for expert in experts for n in expert)]
    own_ranks, own_alphas = first_match(ranks, names), first_match(alphas, names)
    power = 0.5 if config.use_rslora else 1.0

    def setting(name: str) -> tuple[int, float]:
        return own_ranks.get(name, config.r), own_alphas.get(name, config.lora_alpha)

    wanted: dict[str, tuple[int, float]] = {}
    for parameter, experts in projections.items():
        settings = {tuple(setting(n) for n in expert) for expert in experts}
        scalings = {alpha / r**power for expert in settings for r, alpha in expert}
        if len(settings) > 1 or len(scalings) > 1:
            raise PeftError(
                f"rank_pattern and alpha_pattern give the experts of {parameter!r} several ranks or scalings, and they "
                "are one parameter now: give them one."
            )
        first = next(iter(settings))
        rank = sum(r for r, _ in first)
        alpha = first[0][1] if len(first) == 1 else first[0][1] * (rank / first[0][0]) ** power
        if len(first) > 1 or (rank, alpha) != setting(parameter):
            wanted[parameter] = rank, int(alpha) if math.isclose(alpha, round(alpha)) else alpha
    # One pattern for all parameters of a name if they agree; it stands first, since the first that matches counts.
    keys: dict[str, tuple[int, float]] = {}
    for parameter, values in wanted.items():
        end = parameter.rpartition(".")[2]
        same = {p: v for p, v in wanted.items() if p.endswith("." + end)}
        alone = len(set(same.values())) == 1 and len(same) == sum(p.endswith("." + end) for p in every)
        keys[rf".*\.{re.escape(end)}" if alone else parameter] = values
    return {
        "rank_pattern": {**{k: r for k, (r, _) in keys.items()}, **ranks},
        "alpha_pattern": {**{k: a for k, (_, a) in keys.items()}, **alphas},
    }


def without_dropout(config: Any, configs: Mapping[str, Any], infos: Iterable[LayerInfo]) -> dict[str, Any]:
    """The layers' configurations for an adapter from a file: where inputs are not seen, its dropout does not act.

    Files of experts that were modules have one, and it has no part in what they compute.
    """
    there = [n for n in vars(config) if n.endswith("dropout") and getattr(config, n)]
    found = dict(configs)
    transient = [info.name for info in infos if info.transient] if there else []
    for name in transient:
        found[name] = copy.copy(found.get(name, config))
        vars(found[name]).update(dict.fromkeys(there, 0.0))
    if transient:
        dropout = f"{there[0]}={getattr(config, there[0])}"
        warn(f"{dropout} does not act in {list_some(transient)}, whose inputs are not seen.", level=3)
    return found


def lay(side: str, experts: Iterable[Sequence[Tensor]]) -> Tensor:
    """The one tensor that stands for those of the experts' projections, of which each expert has a sequence.

    "lora_A", each [r, in]: [experts * sum of r, in]. "lora_B", each [out, r]: [sum of out, sum of r * experts].
    """
    if side == "lora_A":
        return torch.cat([a for expert in experts for a in expert])
    blocks = [torch.block_diag(*expert) for expert in experts]  # type: ignore[no-untyped-call]
    return torch.stack(blocks, dim=-1).flatten(1)


def joined_state(joined: Sequence[JoinedExperts], config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's tensors by today's keys, from a file that may have a module for each expert, laid together (`lay`): A of
    experts by rank, B of ranks by expert and block-diagonal in what is joined.

    Works on meta tensors too. Raises KeyMismatchError if an expert's tensor is missing.
    """
    if config.peft_type != PeftType.LORA or not any(".lora_" in key for key in tensors):
        return dict(tensors)
    names = _old_names(joined)
    result: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[tuple[str, int], Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])\.weight", key) if names else None
        parameter, old, expert = names.get(found[1], ("", "", None)) if found else ("", "", None)
        if found and expert is not None:
            parts.setdefault((parameter, found[2]), {})[old, expert] = tensor
        elif found and parameter and not old:  # a router
            result[f"{PREFIX}{parameter.removesuffix('.weight')}.{found[2]}.weight"] = tensor
        else:
            result[key] = tensor
    for site in joined:
        own = [p for p in site.projections if (f"{site.name}.{p}", "lora_A") in parts]
        for i, parameter in enumerate(own):
            # Layers of several parameters of a module are nested in its parameters' order.
            where = f"{PREFIX}{site.name}{'.base_layer' * (len(own) - 1 - i)}"
            for side in ("lora_A", "lora_B"):
                held = parts.pop((f"{site.name}.{parameter}", side), {})
                wanted = [[(o, e) for o in site.projections[parameter]] for e in range(site.count)]
                missing = [f"{site.old}.{e}.{o}.{side}" for expert in wanted for o, e in expert if (o, e) not in held]
                if missing:
                    raise KeyMismatchError(f"the experts of {site.name!r} lack {list_some(missing)}")
                shapes = [{tuple(held[o, e].shape) for o, e in column} for column in zip(*wanted, strict=True)]
                if any(len(s) > 1 or len(next(iter(s))) != 2 for s in shapes):
                    raise KeyMismatchError(f"the experts of {site.name!r} have {side} of several shapes: {shapes}")
                result[f"{where}.{side}.weight"] = lay(side, [[held[k] for k in expert] for expert in wanted])
    for (parameter, side), held in parts.items():
        raise KeyMismatchError(f"{parameter!r} has {side} of {len(held)} experts and nothing else")
    return result
