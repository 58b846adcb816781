"""Modules that a configuration means, by name: nothing here touches a module.

A list matches by full name or by a suffix that starts after a dot; a text is a regular expression for the full name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..files.checks import list_some, short
from .base import TargetConfig
from .limits import is_plain
from .patterns import hits_of, match_names
from .types import NoMatchingPeftModuleError, PeftRuntimeWarning, warn

ALL_LINEAR = "all-linear"
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # types of models
READ_BY_KERNELS = ("conv1d", "out_proj")  # modules of those
HEADS = ("classifier", "score", "qa_outputs")  # of transformers' models for tasks


def by_type(table: Mapping[str, str]) -> dict[str, Any]:
    """Names of modules by model type, from the types that have them: {"k v": "t5"} gives {"t5": ["k", "v"]}."""
    return {model: names.split() for names, models in table.items() for model in models.split()}


# What PEFT adapts when no target is named, by `model.config.model_type`. Methods that differ override an entry.
DEFAULT_TARGETS: dict[str, list[str] | str] = by_type({
    "q_proj v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
    "key value receptance output": "rwkv",
    "query value": "bert electra layoutlm roberta xlm-roberta",
    "query_proj value_proj": "deberta-v2",
    "query_key_value": "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    "q v": "mt5 t5",
    "q v q_proj v_proj": "blip-2",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "in_proj": "deberta",
    "qkv_proj": "codegen",
    "Wqkv": "mpt",
}) | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}  # fmt: skip


@dataclass
class Matched:
    """The names that a configuration targets, in the model's order, and those it would but for `exclude_modules`."""

    names: list[str]
    excluded: list[str]


def suffixes(name: str) -> list[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def select(wanted: Iterable[str] | str | None, names: Sequence[str]) -> set[str]:
    """The names that a list of suffixes, or a regular expression, selects."""
    if not wanted:
        return set()
    if isinstance(wanted, str):
        return set(match_names(wanted, names))
    chosen = set(wanted)
    return {name for name in names if any(suffix in chosen for suffix in suffixes(name))}


def minimal_suffixes(wanted: Iterable[str], names: Iterable[str]) -> set[str]:
    """The fewest, shortest suffixes that select exactly `wanted` out of `names`."""
    wanted = set(wanted)
    taken = {suffix for name in names if name not in wanted for suffix in suffixes(name)}
    return {next((s for s in reversed(suffixes(name)) if s not in taken), name) for name in wanted}


def match_targets(config: TargetConfig, names: Sequence[str]) -> Matched:
    """The modules that `config.target_modules` selects, less the excluded ones and those that are trained in full."""
    chosen = select(_targets(config), names)
    wanted = config.layers_to_transform if config.by_layer else None
    if wanted is not None and wanted != [] and chosen:
        layers = {wanted} if isinstance(wanted, int) else set(wanted)
        index = _layer_indices(config.layers_pattern, [n for n in names if n in chosen])
        chosen = {name for name in chosen if index.get(name) in layers}
    excluded = select(config.exclude_modules, names)
    # A module that is copied and trained in full cannot hold an adapter as well.
    saved = [f".{root}." for root in config.modules_to_save or ()]
    excluded.update(n for n in chosen if any(root in f".{n}." for root in saved))
    ordered = [n for n in names if n in chosen]
    return Matched(config.narrowed([n for n in ordered if n not in excluded]), [n for n in ordered if n in excluded])


def _targets(config: TargetConfig) -> Iterable[str] | str | None:
    targets = config.target_modules
    return [targets] if isinstance(targets, str) and config.text_is_end else targets


def _layer_indices(layers_pattern: Iterable[str] | str | None, names: list[str]) -> dict[str, int]:
    """The index of the layer that each name lies in; names outside any layer are missing."""
    if not layers_pattern:
        # The first number, not the last: in `layers.1.experts.0.w1` the layer is 1.
        found = {n: re.search(r"\.(\d+)\.", n) for n in names}
        return {n: int(m.group(1)) for n, m in found.items() if m}
    index: dict[str, int] = {}
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        left = [n for n in names if n not in index]
        pattern = re.escape(pattern) if is_plain(pattern) else pattern
        hits = match_names(pattern, left, prefix=r"(?:^|.*?\.)", suffix=r"\.(?P<idx>\d+)\.")
        index.update({n: int(i) for n, i in hits.items()})
    return index


def check_mamba(config: TargetConfig, model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for LoRA and its kin on modules whose weights Mamba's fused kernels read past any adapter."""
    model_type = model_config(model).get("model_type")
    if model_type in MAMBA and config.peft_type in ("LORA", "ADALORA", "RANDLORA"):
        for name in names:
            if (end := name.rpartition(".")[2]) in READ_BY_KERNELS:
                raise ValueError(
                    f"Module {end!r} is incompatible with Mamba-based models (model_type={model_type!r}): their fused "
                    f"kernels read the weight of {name!r} and would pass an adapter over. Do not target it."
                )


def warn_unmatched(
    config: TargetConfig, patterns: Iterable[str], names: Sequence[str], adapted: Sequence[str], meant: Collection[str]
) -> None:
    """Warn of what a configuration names and the model lacks, which is likely a slip.

    patterns: the fields that give layers values of their own. names: of all modules; adapted: of the layers that get
    the adapter; meant: targets that stand for other things than modules.
    """
    targets, left_out, patterns = _targets(config) or (), config.exclude_modules or (), list(patterns)
    if isinstance(targets, str):
        there = targets.lower() == ALL_LINEAR or select(targets, names)
        lost = {"target_modules": [targets] if not there and targets not in meant else []}
    else:
        ends = {suffix for name in names for suffix in suffixes(name)}
        lost = {"target_modules": [t for t in targets if t not in ends and t not in meant]}
    if left_out and not select(left_out, names):
        lost["exclude_modules"] = [left_out] if isinstance(left_out, str) else list(left_out)
    for field in patterns:
        given = getattr(config, field, None) or ()
        hits = hits_of(given, adapted)
        lost[field] = [pattern for pattern in given if not hits.get(pattern)]
    for field, values in lost.items():
        text = f"{field}: nothing in the model matches {list_some(sorted(values))}."
        if field in patterns:
            text += f" The following {field} keys did not match any targeted module and were ignored: {sorted(values)}."
        elif field == "target_modules" and not select(targets, names):
            text += f" target_modules={short(config.target_modules, 300)} were set but no module was matched."
        elif field == "exclude_modules":
            text += f" You have passed exclude_modules={left_out!r} but no modules were excluded."
        if values:
            warn(text, 3, PeftRuntimeWarning)


def warn_of_difference(by_config: Collection[str], by_keys: Collection[str]) -> None:
    """Warn where a configuration and a state dict's keys, which have the say, name different modules."""
    found = {"PEFT config": set(by_config).difference(by_keys), "state_dict": set(by_keys).difference(by_config)}
    listed = [f"The {what} contained these additional target modules: {sorted(n)}. " for what, n in found.items() if n]
    if listed:
        text = (
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
        )
        warn(f"{text}{''.join(listed)}", 4, PeftRuntimeWarning)


def warn_unsaved(config: TargetConfig, names: Sequence[str]) -> None:
    """Warn of what `modules_to_save` names and the model lacks, where PEFT says nothing. The heads that a task may have
    are named whether they are there or not."""
    wanted = [name for name in config.modules_to_save or () if name not in HEADS]
    if lost := [end for end in wanted if not any(name.endswith(end) for name in names)]:
        warn(f"modules_to_save: nothing in the model matches {list_some(sorted(lost))}: it is not trained.", level=3)


def no_match_error(config: TargetConfig, matched: Matched, possible: Iterable[str]) -> NoMatchingPeftModuleError:
    """An error that says why nothing is left to adapt, and what could be named instead."""
    if matched.excluded:
        return NoMatchingPeftModuleError(
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules. All modules were excluded that "
            f"target_modules={_shown(config.target_modules)} selects: they are left out by "
            f"exclude_modules={_shown(config.exclude_modules)} or modules_to_save={config.modules_to_save}: "
            f"{list_some(matched.excluded)}."
        )
    wanted = config.target_modules  # a pattern stands there as PEFT has it, without quotation marks
    shown = wanted[:300] if isinstance(wanted, str) else _shown(wanted)
    message = f"Target modules {shown} not found in the base model."
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None:
            message += f" Note: {name}={getattr(config, name)!r} leaves out further modules."
    ends = Counter(name.rpartition(".")[2] for name in possible)
    listed = [f"{end} ({count})" for end, count in ends.items()]
    could = f"What could be targeted: {list_some(listed, 24) or 'nothing'}."
    return NoMatchingPeftModuleError(f"{message} {could} No modules were targeted for adaptation.")


def _shown(value: object) -> str:
    return short(sorted(value) if isinstance(value, (set, frozenset)) else value, 300)


def model_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None) or {}
    content = config.to_dict() if hasattr(config, "to_dict") else config
    return dict(content) if isinstance(content, Mapping) else dict(vars(content))
