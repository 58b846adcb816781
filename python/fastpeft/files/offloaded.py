"""Tensors that accelerate keeps in the host's memory or on disk and that a hook of their module brings for its forward.

Nothing of accelerate is imported: what it does to a module says what there is (`module._hf_hook`).
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .atomic import atomic_file


def keeper(module: nn.Module) -> Any:
    """The hook that brings a module's own tensors; None for a module that has them."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "offload", False)), None)


@contextmanager
def brought(module: nn.Module, changes: bool = False) -> Iterator[None]:
    """Within this, a module has its own tensors, and its forward is the one without the hook that brings them.

    changes: parameters that it has been given meanwhile are brought from then on.
    """
    hook, own = keeper(module), vars(module)
    tensors = (t for store in (module._parameters, module._buffers) for t in store.values() if t is not None)
    if hook is None or not any(t.is_meta for t in tensors):
        yield
        return
    with torch.device("cpu" if hook.execution_device is None else hook.execution_device):  # also under device("meta")
        hook.pre_forward(module)
    forward, found = own.get("forward"), dict(module._parameters)
    if "_old_forward" in own:
        own["forward"] = own["_old_forward"]
    try:
        yield
        for name, parameter in module._parameters.items() if changes else ():
            if parameter is not None and parameter is not found[name]:
                keep(module, name, parameter.detach())
    finally:
        if forward is not None:
            own["forward"] = forward
        hook.post_forward(module, None)


def kept(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A module's tensor of this name, or what accelerate keeps for it."""
    hook = keeper(module) if tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[name]  # type: ignore[no-any-return]


def keep(module: nn.Module, name: str, value: Tensor) -> None:
    """Have a module's hook bring `value` from now on; what was on disk goes into a new file beside the others."""
    held, key = keeper(module).weights_map, name
    while hasattr(held, "prefix"):
        held, key = held.dataset, held.prefix + key
    if isinstance(held, MutableMapping):
        held[key] = value.cpu()
    elif key not in held.index:
        held.state_dict[key] = value.cpu()
    else:
        from safetensors.torch import save_file

        folder = held.save_folder or Path(held.index[key]["safetensors_file"]).parent
        file = Path(folder) / f"{key}.changed.safetensors"
        with atomic_file(file) as temporary:  # who has the old file mapped into memory keeps it
            save_file({key: value.cpu().contiguous().clone()}, temporary)
        held.index[key] = {"safetensors_file": str(file), "weight_name": key}


def device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """The device that a module's tensor is on while the module computes."""
    hook = keeper(module) if tensor.is_meta else None
    return tensor.device if hook is None or hook.execution_device is None else torch.device(hook.execution_device)
