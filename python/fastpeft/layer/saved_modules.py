"""ModulesToSaveWrapper: a module of which each adapter trains and saves a full copy (a new head, say)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.limits import BASE
from ..config.seen_as_peft import SeenAsPeft
from ..config.types import UnmixableError
from ..weights.base import Wrapping
from .by_row.call import RowNames, names_of
from .by_row.names import check_length, grouped
from .containers import ActiveAdapters, AdapterDict


class AuxiliaryTrainingWrapper(SeenAsPeft):
    """A module that is trained beside adapter layers, as the functions of PEFT and of transformers ask it for its
    adapters: about a state dict of the module, which they have of a model that is sharded, say."""

    @abstractmethod
    def adapter_state(self, adapter: str) -> Iterator[tuple[str, str, Tensor]]:
        """As `AdapterLayer.adapter_state`."""

    @abstractmethod
    def _get_available_adapters(self) -> set[str]:
        """The adapters that are trained here."""

    @property
    def _adapters(self) -> set[str]:
        return self._get_available_adapters()

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors that a file has of an adapter, from the module's state dict."""
        return {key: state_dict[name] for name, key, _ in self.adapter_state(adapter_name)}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The keys in the module's state dict, by those in a file."""
        return {key: name for name, key, _ in self.adapter_state(adapter_name)}

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """The one of these adapters that is trained here; two cannot compute at once."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        found = [name for name in names if name in self._adapters]
        if len(found) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {type(self).__name__}, got {found}")
        return found[0] if found else None


class ModulesToSaveWrapper(ActiveAdapters, AuxiliaryTrainingWrapper, nn.Module):
    """Holds the original module and one trained copy per adapter; the active adapter's copy computes.

    Keys in memory are `<module>.modules_to_save.<adapter>.<tensor>`, in a file `<module>.<tensor>`.
    """

    adapter_layer_names = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, module_to_save: nn.Module) -> None:
        super().__init__()
        check_savable(module_to_save)
        self.original_module = module_to_save
        self.modules_to_save = AdapterDict()
        self._row_names: RowNames | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_modules" not in self.__dict__:
                raise
        return getattr(self.current(), name)  # a model may read, say, `lm_head.weight`

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def current(self) -> nn.Module:
        """The module that computes now."""
        active = () if self._disable_adapters else self._active_adapter
        found = (self.modules_to_save[name] for name in active if name in self.modules_to_save)
        return next(found, self.original_module)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Remove an adapter. new_active_adapters: become the active ones, where they have a copy here."""
        self.modules_to_save.pop(adapter_name, None)
        self._active_adapter = [n for n in self._active_adapter if n != adapter_name]
        if new_active_adapters:
            self.set_adapter(new_active_adapters)

    def check_active(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the adapters that have a copy here; two copies cannot both compute."""
        found = self.check_set_adapter(adapter_names)
        return [] if found is None else [found]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        self._active_adapter = self.check_active([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        for name in self.modules_to_save:
            self.modules_to_save[name].requires_grad_(name in self._active_adapter and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self._active_adapter)
        else:
            self.modules_to_save.requires_grad_(False)

    @property
    def row_names(self) -> RowNames | None:
        """As `AdapterLayer.row_names`."""
        names = names_of(self)
        return self._row_names if names is None else names

    def set_rows(self, adapter_names: Sequence[str] | None, steady: bool = False) -> None:
        """As `AdapterLayer.set_rows`."""
        self._row_names = None if adapter_names is None else tuple(adapter_names)

    shared: ClassVar[dict[str, str]] = {}  # as `AdapterLayer.shared`

    def containers(self) -> Iterator[tuple[str, AdapterDict]]:
        """As `AdapterLayer.containers`."""
        yield "modules_to_save", self.modules_to_save

    def adapter_state(
        self, adapter: str, state: Mapping[str, Tensor] | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, str, Tensor]]:
        """As `AdapterLayer.adapter_state`."""
        for key, tensor in self.modules_to_save.tensors(adapter, state, f"{prefix}modules_to_save."):
            yield f"modules_to_save.{adapter}.{key}", key, tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop("adapter_names", None) or self.row_names
        if rows is None or self._disable_adapters:
            return self.current()(*args, **kwargs)
        x, rest = args[0], args[1:]
        check_length(x, rows)
        groups = grouped(name if name in self.modules_to_save else BASE for name in rows)
        order = [i for members in groups.values() for i in members]
        modules = ((self.modules_to_save.get(name, self.original_module), members) for name, members in groups.items())
        parts = [module(x[members], *rest, **kwargs) for module, members in modules]
        if not all(isinstance(part, Tensor) for part in parts):
            name = type(self.original_module).__name__
            raise UnmixableError(
                f"a mixed batch needs modules that return one tensor, which {name} does not. Mixed batching is only "
                "supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d, and others that do."
            )
        return torch.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]


def check_savable(module: nn.Module) -> None:
    """Raise TypeError for modules that cannot be trained as a copy."""
    if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, AdapterDict, Wrapping)):
        raise TypeError(f"modules_to_save cannot be applied to modules of type {type(module)}")
