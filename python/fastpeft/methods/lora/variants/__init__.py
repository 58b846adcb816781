"""LoRA's variants, one file each: methods of the same `peft_type` that an option of LoraConfig chooses.

A new file is found by itself. Its class is decorated with `@variant("use_dora")`, the option that asks for it; PEFT
allows one variant at a time, and so does `Lora.variant`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ...method import Method
from ..start import starts

V = TypeVar("V", bound=type[Method])
VARIANTS: dict[str, Method] = {}
# The classes of nested configurations, by the field of LoraConfig.
SUB_CONFIGS: dict[str, type[Any]] = {start.field: start.options for start in starts() if start.options}


def variant(option: str, config_class: type[Any] | None = None) -> Callable[[V], V]:
    """Class decorator: the method that LoraConfig means when `asks(config, option)`; its examples join LoRA's,
    its layers are linear, and no process has a part of them, unless it names other kinds and ways.

    config_class: of the option's value, which files hold as a dictionary; it is exported as `fastpeft.<its name>`.
    """

    def add(cls: V) -> V:
        VARIANTS[option] = cls()
        cls.kinds = vars(cls).get("kinds", Method.kinds)
        cls.parallel = vars(cls).get("parallel", Method.parallel)
        lora: type[Method] = cls.__bases__[0]
        lora.examples = (*lora.examples, *cls.examples)
        lora.model_methods = {**lora.model_methods, **cls.model_methods}
        if config_class is not None:
            SUB_CONFIGS[option] = config_class
        return cls

    return add


def variant_of(config: Any) -> Method | None:
    """The variant that a LoraConfig asks for, if any; ValueError if it asks for several."""
    asked = [option for option in VARIANTS if asks(config, option)]
    if len(asked) > 1:
        raise ValueError(f"LoraConfig asks for {' and '.join(asked)}: only one variant of LoRA can be chosen.")
    return VARIANTS[asked[0]] if asked else None


def asks(config: Any, option: str) -> bool:
    """True if a variant's option is set: a field that is truthy, or a value of `init_lora_weights` (mica)."""
    return bool(getattr(config, option)) if hasattr(config, option) else config.init_lora_weights == option


def views(tuner: Any, adapter_names: str | list[str] | None, method: type[Method]) -> Iterator[tuple[str, Any]]:
    """(name, view) of each of the adapters (None: the active ones) in each layer where it is one of this method."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or tuner.active_adapters
    for _, layer in tuner.adapter_layers():
        yield from ((name, layer.view(name)) for name in names if isinstance(layer.methods.get(name), method))
