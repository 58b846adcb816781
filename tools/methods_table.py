"""Write docs/methods.md from the registry: `python tools/methods_table.py [--check]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from fastpeft.config import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig
from fastpeft.method import Method, registry
from fastpeft.methods.variants import VARIANTS

TARGET = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
HEAD = """# Methods

Every row is one file in `python/fastpeft/methods/` (LoRA's variants in `methods/variants/`); its docstring derives what
it costs. Configurations, defaults, keys and files are those of PEFT 0.21. "linear" is nn.Linear, transformers' Conv1D
and 4-bit and 8-bit layers. All methods share `target_modules`, `exclude_modules`, `modules_to_save`,
`layers_to_transform` and `layers_pattern`. Made by `python tools/methods_table.py`.

| method | what it does | layers | merges | its options and defaults |
|---|---|---|---|---|
"""
SHARED = {f.name for c in (TargetConfig, HasBias, HasFanInFanOut, HasInitWeights) for f in dataclasses.fields(c)}


def summary(method: Method) -> str:
    """The first sentence of the file's docstring."""
    text = " ".join((sys.modules[type(method).__module__].__doc__ or "").split("\n\n")[0].split())
    return text.partition(": ")[2].replace("|", "\\|") or text.replace("|", "\\|")


def options(method: Method) -> str:
    own = []
    for f in dataclasses.fields(method.config_class):
        if f.name not in SHARED:
            default = f.default if f.default is not dataclasses.MISSING else None
            if default is dataclasses.MISSING or default is None:
                default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
            own.append(f"{f.name}={getattr(default, 'value', default)!r}")
    return ", ".join(own)


def row(name: str, method: Method, fields: str) -> str:
    merges = "yes" if method.mergeable else "no"
    return f"| {name} | {summary(method)} | {', '.join(sorted(method.kinds))} | {merges} | {fields} |"


def table() -> str:
    lines = []
    for kind, method in sorted(registry().items(), key=lambda item: item[0].value):
        lines.append(row(f"`{kind.value}`", method, f"`{options(method)}`" if options(method) else ""))
        if kind.value == "LORA":
            lines += [row(f"`LORA` with `{option}`", v, "as LORA") for option, v in sorted(VARIANTS.items())]
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    text = table()
    if "--check" in sys.argv:
        same = TARGET.exists() and TARGET.read_text(encoding="utf-8") == text
        print(f"{TARGET.name} is {'up to date' if same else 'out of date: run python tools/methods_table.py'}")
        return 0 if same else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
