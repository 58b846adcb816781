"""ModuleLayer: an adapter layer on a whole module, which gives and takes whatever that module does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..methods.whole import WholeMethod
from .by_row.names import check_length, grouped
from .layer import AdapterLayer


class ModuleLayer(AdapterLayer):
    """A module with adapters around it. Attributes that it lacks are the module's: loops over a decoder's blocks read
    them. Names of modules and tensors below it are those that they had: `base_layer` is in keys in memory alone."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "_base") or "base_layer" not in self._modules:
                raise
        return getattr(self.base_layer, name)

    @property
    def _scaling(self) -> dict[str, Any]:
        return {}  # an attention has an attribute of that name

    def to_merge(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        wanted = self._active_adapter if adapter_names is None else adapter_names
        if kinds := sorted({self.methods[name].peft_type.value for name in wanted if name in self.methods}):
            raise NotImplementedError(
                f"{self._shown} has adapters that cannot be merged ({', '.join(kinds)}): what they do depends on the "
                "input, and no weight does the same. `unload()` gives the base model back."
            )
        return []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop("adapter_names", None) or self.rows.names
        served: dict[str, list[int] | None] = dict.fromkeys(self._active_adapter)
        if rows is not None:
            check_length(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), rows)
            served = {**grouped(rows)}
        call: Any = self.base_layer
        for name, members in served.items() if not self._disable_adapters else ():
            if name in self.methods:
                whole = len(served) == 1 and self._method(name).alone  # the batch has this adapter, and can have
                call = functools.partial(self._around, name, call, None if whole else members)
        return call(*args, **kwargs)

    def _around(self, name: str, inner: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        return self._method(name).around(self, name, inner, args, kwargs, rows)

    def _method(self, name: str) -> WholeMethod:
        method = self.methods[name]
        assert isinstance(method, WholeMethod)
        return method

    def _set_requires_grad(self, adapter: str, requires_grad: bool) -> None:
        super()._set_requires_grad(adapter, requires_grad)
        self._method(adapter).freeze(self, adapter)
