"""PEFT's `utils.transformers_weight_conversion`: an adapter's keys in a file and in a model, in the form in which
transformers' `load_adapter` takes them, as the renamings and conversions that it loads models with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from ..inject.modules import walk
from ..inject.old_experts import convert_targets, find_joined, joined_state, lay
from ..layer.shared_tensors import IN_MODEL
from ..methods.registry import method_of, registry


def build_peft_weight_mapping(
    weight_conversions: Iterable[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings, and conversions of experts, that give a file's keys the names in a model without a PeftModel.

    weight_conversions: of the model's own weights, `WeightRenaming` and `WeightConverter`. peft_config: whose keys
    alone are looked for; None for those of all methods.
    """
    methods = registry().values() if peft_config is None else [method_of(peft_config)]
    # A replacement takes the place of the first such text in a key, so texts begin at a dot.
    result = [WeightRenaming("^base_model.model.", "")]
    # What all layers share a tuner has in files, and the model itself here. VeRA's is not called as its prefix is.
    result.append(WeightRenaming(r"^base_model\.", f"{IN_MODEL}."))
    for prefix in sorted({method.prefix for method in methods}):
        result.append(WeightRenaming(rf"\.({re.escape(prefix)}[^\.]*)", rf".\1.{adapter_name}"))
    result.append(WeightRenaming(rf"^{IN_MODEL}\.([^\.]*)$", rf"{IN_MODEL}.\1.{adapter_name}"))
    magnitude = f".lora_magnitude_vector.{adapter_name}"  # a module in memory, though files name no tensor of it
    result.append(WeightRenaming(rf"{re.escape(magnitude)}$", f"{magnitude}.weight"))
    experts = []
    for conversion in weight_conversions or ():
        if isinstance(conversion, WeightConverter):
            if _of_experts(conversion):
                experts.append(conversion)
        else:
            result.append(conversion)
    for conversion in experts:
        module = conversion.target_patterns[0].rpartition(".")[0]
        own = [c for c in experts if c.target_patterns[0].rpartition(".")[0] == module and _targeted(c, peft_config)]
        if conversion in own:
            # Layers of several parameters of a module are nested in its parameters' order.
            where = f"{module}{'.base_layer' * (len(own) - 1 - own.index(conversion))}"
            result.extend(_converter(conversion, where, side, adapter_name) for side in ("lora_A", "lora_B"))
    return result


class LayExperts(ConversionOps):
    """Lay the tensors of experts together, which a file has one by one. side: "lora_A" or "lora_B"."""

    def __init__(self, side: str) -> None:
        self.side = side

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        columns = [input_dict.get(pattern, []) for pattern in source_patterns]
        if len({len(column) for column in columns}) != 1:
            counts = ", ".join(f"{len(c)} of {p}" for p, c in zip(source_patterns, columns, strict=True))
            raise ValueError(f"each expert should have the same tensors, the file has {counts}")
        return {target_patterns[0]: lay(self.side, list(zip(*columns, strict=True)))}


def _of_experts(conversion: Any) -> bool:
    steps = [type(step).__name__ for step in conversion.operations]
    return len(conversion.target_patterns) == 1 and steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def _old(conversion: Any) -> list[str]:
    """The names that an expert's modules had, in the order of the rows of the parameter that they became."""
    return [source.removesuffix(".weight").rpartition(".")[2] for source in conversion.source_patterns]


def _targeted(conversion: Any, config: Any) -> bool:
    """True if an adapter acts on the parameter of a conversion, as far as a configuration can tell without a model."""
    targets = getattr(config, "target_modules", None)
    if targets is None or isinstance(targets, str):
        return True
    names = [*targets, *(getattr(config, "target_parameters", None) or ())]
    ends = {*_old(conversion), conversion.target_patterns[0].rpartition(".")[2]}
    return any(name.rpartition(".")[2] in ends for name in names)


def _converter(conversion: Any, where: str, side: str, adapter: str) -> Any:
    sources = [f"{s.removesuffix('.weight')}.{side}.{adapter}.weight" for s in conversion.source_patterns]
    made = WeightConverter(sources, f"{where}.{side}.{adapter}.weight", operations=[LayExperts(side)])
    for name in ("scope_prefix", "base_model_prefix"):  # which part of a model the conversion is for
        if hasattr(conversion, name):
            setattr(made, name, getattr(conversion, name))
    return made


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Any = None) -> None:
    """Let a configuration's targets that were modules of experts in transformers 4 be parameters, in place.

    `get_peft_model` and all that loads do this by themselves. conversions: PEFT's; the model knows its own.
    """
    sites = {site.name: site for site in walk(model)}
    converted = convert_targets(peft_config, method_of(peft_config), find_joined(model), sites)
    vars(peft_config).update(converted.changes)


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: Any, adapter_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """A file's tensors by today's keys, where it may have a module for each expert; what loads does this by itself."""
    return joined_state(find_joined(model), peft_config, adapter_state_dict)
