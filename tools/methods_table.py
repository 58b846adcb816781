"""Write docs/methods.md from the registry: `python tools/methods_table.py [--check]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from benchmarks_cells import wrapped
from fastpeft.config.base import HasBias, HasFanInFanOut, HasInitWeights, PromptLearningConfig, TargetConfig
from fastpeft.methods.lora.variants import VARIANTS
from fastpeft.methods.method import Method
from fastpeft.methods.registry import every_method
from made_files import write_or_check

TARGET = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
HEAD = """# Methods

Every row is one file in `python/fastpeft/methods/` (LoRA's variants in `methods/variants/`), or in
`python/fastpeft/prompts/` for prompts, which are in no layer; its docstring derives what it costs. Configurations,
defaults, keys and files are those of PEFT 0.21. "linear" is nn.Linear, transformers' Conv1D and 4-bit and 8-bit layers;
"module" is an attention or a decoder's block as a whole. Made by `python tools/methods_table.py`.

| method | what it does | layers | merges |
|---|---|---|---|
"""
OPTIONS = """
## Options and their defaults

Methods of layers share `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform` and
`layers_pattern`; prompts share `num_virtual_tokens`, `token_dim`, `num_transformer_submodules`, `num_attention_heads`,
`num_layers` and `modules_to_save`. The docstring of a method's configuration says what its options mean; `fastpeft
train` takes them as `adapter.NAME`.

"""
COMMON = (TargetConfig, HasBias, HasFanInFanOut, HasInitWeights, PromptLearningConfig)
SHARED = {f.name for c in COMMON for f in dataclasses.fields(c)}


def summary(method: Method) -> str:
    """The first sentence of the file's docstring."""
    text = " ".join((sys.modules[type(method).__module__].__doc__ or "").split("\n\n")[0].split())
    return text.partition(": ")[2].replace("|", "\\|") or text.replace("|", "\\|")


def options(config: type) -> list[str]:
    """`name=default` of each field that not all methods share."""
    own = []
    for f in dataclasses.fields(config):
        if f.name not in SHARED:
            default = f.default if f.default is not dataclasses.MISSING else None
            if default is dataclasses.MISSING or default is None:
                default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
            own.append(f"`{f.name}={getattr(default, 'value', default)!r}`")
    return own


def option_list() -> list[str]:
    """One item per method: its options; of another method's that it takes over, that method's name alone."""
    classes = {method.config_class: kind.value for kind, method in every_method().items()}
    items = []
    for config, name in sorted(classes.items(), key=lambda item: item[1]):
        parent = next((c for c in config.__mro__[1:] if c in classes), None)
        inherited = options(parent) if parent else []
        said = [f"those of `{classes[parent]}`"] if parent else []
        said += [option for option in options(config) if option not in inherited]
        if said:
            items.append("- " + wrapped(f"`{name}`: {', '.join(said)}", 118).replace("\n", "\n  "))
    return items


def row(name: str, method: Method) -> str:
    merges = "yes" if method.mergeable else "no"
    where = "the input" if method.prompts else ', '.join(sorted(method.kinds))
    return f"| {name} | {summary(method)} | {where} | {merges} |"


def table() -> str:
    lines = []
    for kind, method in sorted(every_method().items(), key=lambda item: item[0].value):
        lines.append(row(f"`{kind.value}`", method))
        if kind.value == "LORA":
            lines += [row(f"`LORA` with `{option}`", v) for option, v in sorted(VARIANTS.items())]
    return HEAD + "\n".join(lines) + "\n" + OPTIONS + "\n".join(option_list()) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({TARGET: table()}))
