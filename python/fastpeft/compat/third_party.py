"""`register_peft_method`: methods of other packages, as far as they are a method of ours under another name."""

from __future__ import annotations

from typing import Any

from ..config.base import CLASSES
from ..config.types import peft_type
from ..methods.registry import every_method, registry
from ..model import tuner

# What PEFT's tuner classes write anew to put their own layers into a model. Nothing here calls it.
_BUILDING = (
    "inject_adapter", "_create_and_replace", "_create_new_module", "_replace_module", "_prepare_adapter_config",
    "_prepare_model", "_check_new_adapter_config", "_check_target_module_exists", "_mark_only_adapters_as_trainable",
    "_pre_injection_hook", "_post_injection_hook", "tuner_layer_cls", "target_module_mapping",
)  # fmt: skip


def register_peft_method(
    *, name: str, config_cls: Any, model_cls: Any, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Register a method by its configuration and its tuner class, as in PEFT.

    name: of a PeftType that no method here has, in lower case. model_cls: a subclass of one of our tuner classes
    (LoraModel), whose mathematics, tensors and prefix the method has, beside what the class adds. config_cls: a
    subclass of that method's configuration. prefix: of the tensors' names; by default the name and "_".
    is_mixed_compatible: PEFT's; every method here can be mixed.
    Raises ValueError, KeyError (already registered) and TypeError for what makes no sense, and NotImplementedError for
    a tuner class that puts layers of its own into a model. Nothing is registered then.
    """
    if name.endswith("_") or not name.islower():
        raise ValueError(f"`name` should be in lower case letters, without '_' at its end, got {name!r}")
    kind, prefix = peft_type(name.upper()), prefix or f"{name}_"
    if kind in every_method():
        raise KeyError(f"There is already a method {name!r} ({every_method()[kind].config_class.__name__})")
    called, own_prefix = getattr(model_cls, "__name__", repr(model_cls)), getattr(model_cls, "prefix", None)
    if own_prefix not in (None, prefix):
        raise ValueError(f"`prefix` is {prefix!r}, and {called}.prefix is {own_prefix!r}: they should agree")
    base = next((m for m in registry().values() if _derives(model_cls, tuner.tuner_class(m))), None)
    own = [c for c in getattr(model_cls, "__mro__", ()) if not c.__module__.startswith(f"{__name__.split('.')[0]}.")]
    building = [n for n in _BUILDING if any(n in vars(cls) for cls in own)]
    if base is None or building:
        why = f"writes {', '.join(building)} anew" if building else "derives from none of fastpeft's tuner classes"
        raise NotImplementedError(
            f"fastpeft cannot run the method {name!r}: its tuner class {called} {why}, so it puts "
            "layers of its own into a model, as PEFT's BaseTuner does; fastpeft has one layer that methods compute in "
            "(fastpeft.Method). Use it with PEFT itself: `fastpeft run --patch SCRIPT`, or fastpeft.patch()."
        )
    if not _derives(config_cls, base.config_class):
        raise TypeError(f"`config_cls` should be a subclass of {base.config_class.__name__}, got {config_cls!r}")
    if vars(tuner).get(called, model_cls) is not model_cls:
        raise ValueError(f"There is already a tuner class {called}: give yours another name")
    vars(tuner)[called] = model_cls  # where `tuner_class` looks for it
    config_cls.own_type, CLASSES[kind.value] = kind, config_cls
    own_method: Any = type(base)
    made = type(own_method)(called, (own_method,), {"prefix": prefix, "__module__": __name__}, config=config_cls)
    made.model_name = called


def _derives(cls: Any, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base)
