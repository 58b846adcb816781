"""AdapterDict: one container per tensor name, keyed by adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config.seen_as_peft import SeenAsPeft

# How often entries of any container of this process came, went or were others: one number to look at for all of them.
CHANGES = {"containers": 0}


class AdapterDict(nn.Module):
    """Parameters, buffers and modules by adapter name, side by side.

    nn.ModuleDict and nn.ParameterDict refuse names that are attributes of a module, such as `train` or `keys`, and
    neither holds what the other does; LoRA's `lora_A` is a module and AdaLoRA's a parameter, and one layer may have
    both. Keys in `state_dict` are `<container>.<adapter>` and `<container>.<adapter>.<tensor>`, as PEFT's.

    version: rises whenever an entry comes, goes or is another (`AdapterLayer.version`).
    """

    version = 0

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.update(items or {})

    def __setitem__(self, name: str, value: nn.Module | Tensor) -> None:
        self.set(name, value, getattr(value, "persistent", True))

    def set(self, name: str, value: nn.Module | Tensor, persistent: bool = True) -> None:
        """Store a module, a parameter, or (any other tensor) a buffer, which `state_dict` has if `persistent`."""
        if not isinstance(name, str) or not name or "." in name:
            raise KeyError(f"adapter name must be a text without dots, got {name!r}")
        self._forget(name)
        if isinstance(value, nn.Module):
            self._modules[name] = value
        elif isinstance(value, nn.Parameter):
            self._parameters[name] = value
        elif isinstance(value, Tensor):
            self._buffers[name] = value
            if not persistent:
                self._non_persistent_buffers_set.add(name)
        else:
            raise TypeError(f"AdapterDict holds modules and tensors, got {type(value).__name__}")

    def _changed(self) -> None:
        self.__dict__["version"] = self.version + 1
        CHANGES["containers"] += 1

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training":
            self._changed()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._changed()
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterDict:
        self._changed()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _forget(self, name: str) -> None:
        self._changed()
        self._modules.pop(name, None)
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def __getitem__(self, name: str) -> Any:
        for store in (self._modules, self._parameters, self._buffers):
            if name in store:
                return store[name]
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._forget(name)

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._parameters or name in self._buffers

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters) + len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._parameters, *self._buffers])

    # As a MutableMapping, which this cannot be: one has no hash, and modules need theirs.
    keys, values, items, get = (getattr(Mapping, name) for name in ("keys", "values", "items", "get"))
    update: Any = MutableMapping.update

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self and default:
            return default[0]
        value = self[name]
        self._forget(name)
        return value

    def tensors(
        self, name: str, state: Mapping[str, Tensor] | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, Tensor]]:
        """(suffix, tensor) of everything that `state_dict` has for an adapter; the suffix is "" for a tensor itself.

        state: a state dict to take it from, where this container's keys start with `prefix`.
        """
        if state is not None:
            key = prefix + name
            yield from ((k[len(key) + 1 :], t) for k, t in state.items() if k == key or k.startswith(f"{key}."))
            return
        value = self.get(name)
        if isinstance(value, Tensor):
            if name not in self._non_persistent_buffers_set:
                yield "", value
        elif isinstance(value, nn.Module):
            held = value.state_dict(keep_vars=True).items()
            yield from ((k, t) for k, t in held if isinstance(t, Tensor))  # Megatron's have an extra state, None

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter."""
        value = self.get(name)
        if isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()

    def to_entry(self, name: str, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move one adapter's entry to a device and its floating-point tensors to a dtype (None leaves either)."""
        value = self[name]
        if isinstance(value, nn.Module):
            value.to(device=device, dtype=dtype)
            return
        target = dtype if dtype is not None and value.is_floating_point() else None
        moved = value.to(device=device, dtype=target)
        if moved is value:
            return
        if isinstance(value, nn.Parameter):
            self._parameters[name] = nn.Parameter(moved.detach(), value.requires_grad)
        else:
            self._buffers[name] = moved

    def extra_repr(self) -> str:
        tensors = {**self._parameters, **self._buffers}
        return ", ".join(f"{name}: {tuple(t.shape)}" for name, t in tensors.items() if t is not None)


def _counted(name: str) -> Any:
    """A method of dict that makes the version rise."""
    method = getattr(dict, name)

    def changed(self: AdapterValues, *args: Any, **named: Any) -> Any:
        self.version += 1
        CHANGES["containers"] += 1
        return method(self, *args, **named)

    return changed


class AdapterValues(dict[str, Any]):
    """Plain values by adapter (`layer.scaling`). version: as an `AdapterDict`'s."""

    version = 0
    __setitem__, __delitem__, __ior__ = map(_counted, ("__setitem__", "__delitem__", "__ior__"))
    pop, update, clear = map(_counted, ("pop", "update", "clear"))


class ActiveAdapters(SeenAsPeft):
    """Active, merged and disabled adapters of a module: PEFT's properties."""

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    active_adapter = active_adapters

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters
