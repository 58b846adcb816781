"""Models whose tables and layers no reader of folders knows: `save_pretrained` of the base is an error."""

from __future__ import annotations

from functools import partial
from typing import Any


def refuse_saving(model: Any, why: str) -> None:
    """Make `model.save_pretrained` raise ValueError with `why`, except for adapters that transformers' own
    `add_adapter` put in, which it saves."""
    model.save_pretrained = partial(_save, model, why)


def _save(model: Any, why: str, *args: Any, **options: Any) -> Any:
    if getattr(model, "_hf_peft_config_loaded", False):
        return type(model).save_pretrained(model, *args, **options)
    raise ValueError(f"save_pretrained: {why}")
