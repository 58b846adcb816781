"""The base model's tensors under the keys that they had before adapters were put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..inject.tokens import TrainableTokensWrapper
from ..layer.containers import AdapterDict
from ..layer.layer import AdapterLayer
from ..layer.saved_modules import ModulesToSaveWrapper
from .state_dict import IncompatibleKeys


def _original_keys(base: nn.Module) -> dict[str, str]:
    """The key in memory of each of the base model's tensors, by the key that it had."""
    modules = dict(base.named_modules(remove_duplicate=False))  # layers may share what adapters have
    adapters = {n for n, m in modules.items() if isinstance(m, AdapterDict)}
    wrapped = {f"{n}.base_layer".lstrip(".") for n, m in modules.items() if isinstance(m, AdapterLayer)}
    wrapped |= {f"{n}.original_module".lstrip(".") for n, m in modules.items() if isinstance(m, ModulesToSaveWrapper)}
    wrapped |= {f"{n}.token_adapter".lstrip(".") for n, m in modules.items() if isinstance(m, TrainableTokensWrapper)}
    found = {}
    for key in base.state_dict():
        parts = key.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if not adapters.intersection(above):
            found[".".join(part for part, path in zip(parts, above, strict=True) if path not in wrapped)] = key
    return found


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict of a PeftModel's base model as it would be without adapters (their merged updates included)."""
    base = model.get_base_model()
    state = base.state_dict()
    return {original: state[key] for original, key in _original_keys(base).items()}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> IncompatibleKeys:
    """Load a state dict of the base model, with the keys that it had without adapters, into a PeftModel.

    strict: raise RuntimeError, before anything is loaded, if keys are missing or unexpected; else they are returned.
    """
    base = model.get_base_model()
    keys = _original_keys(base)
    result = IncompatibleKeys([k for k in keys if k not in state_dict], [k for k in state_dict if k not in keys])
    if strict and any(result):
        what = "Missing keys: {}. Unexpected keys: {}.".format(*result)
        raise RuntimeError(f"The state dict is not the base model's. {what}")
    base.load_state_dict({keys[k]: value for k, value in state_dict.items() if k in keys}, strict=False)
    return result
