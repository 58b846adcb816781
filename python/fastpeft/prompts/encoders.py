"""The prompts of a model, by adapter: what of an adapter module's life they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..config.types import warn
from ..layer.containers import ActiveAdapters, AdapterDict


class PromptEncoders(ActiveAdapters, AdapterDict):
    """The encoder of each adapter that is a prompt. Keys in `state_dict` are `prompt_encoder.<adapter>.<tensor>`."""

    shared: ClassVar[dict[str, str]] = {}  # as `AdapterLayer.shared`

    def _get_available_adapters(self) -> set[str]:
        return set(self)

    def check_active(self, adapter_names: Sequence[str]) -> list[str]:
        """Those of the adapters that are prompts; two cannot both stand before the input."""
        found = [name for name in adapter_names if name in self]
        if len(found) > 1:
            raise ValueError(f"Only one prompt can be active at a time, got {found}")
        return found

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        self._active_adapter = self.check_active([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        for name in self:
            self.set_requires_grad(name, name in self._active_adapter and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self[name].trained() if name in self else ():
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        if enabled:
            self.set_adapter(self._active_adapter)
        else:
            self.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        self.pop(adapter_name, None)
        self._active_adapter = [name for name in self._active_adapter if name != adapter_name]

    def set_rows(self, adapter_names: Sequence[str] | None, steady: bool = False) -> None:
        """Nothing: a prompt stands in the model's inputs, which are made for the rows of each call."""

    def containers(self) -> Iterator[tuple[str, AdapterDict]]:
        """As `AdapterLayer.containers`."""
        yield "", self

    def adapter_state(
        self, adapter: str, state: Mapping[str, Tensor] | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, str, Tensor]]:
        """As `AdapterLayer.adapter_state`."""
        for key, tensor in self.tensors(adapter, state, prefix):
            yield f"{adapter}.{key}", key, tensor

    def make_room(self, adapter: str) -> Callable[[], None]:
        """Let an encoder take over the prompt of a file, which lacks the network that made it: training goes on with
        the prompt itself. Returns what takes that back."""
        encoder = self[adapter]
        before = dict(encoder._modules)
        if hasattr(encoder, "drop_network"):
            encoder.drop_network()
        if len(encoder._modules) < len(before):
            warn(f"A file has the prompt of {adapter!r}, not the network that made it: it is trained by itself now.", 3)
        return lambda: encoder.__dict__.update(_modules=before)
