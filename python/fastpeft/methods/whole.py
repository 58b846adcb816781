"""Methods that act on a whole module, an attention or a decoder's block, whose arguments and outputs they see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.targets import ALL_LINEAR
from ..weights.whole_module import WholeModule
from .method import Method

Rows = Sequence[int] | None  # those of a batch that an adapter serves; None: all


class WholeMethod(Method):
    """A method whose layers are modules. It has no weight, no merged form and no part in the law of `method.py`;
    adapter i wraps the module that adapters 0..i-1 made. alone: no other adapter of the method is active with one."""

    kinds = frozenset({"module"})
    examples = ()
    mergeable = False
    alone: ClassVar[bool] = False

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        if str(config.target_modules).lower() == ALL_LINEAR:
            raise ValueError(f"{self.peft_type.value} acts on whole modules, target_modules={ALL_LINEAR!r} names none.")

    def check_together(self, views: Sequence[Any]) -> None:
        if self.alone:
            names, kind = [s._name for s in views], self.peft_type.value
            raise ValueError(f"{kind} requires exactly one active adapter, but got {len(names)} adapters: {names}.")

    def base_of(self, module: nn.Module, model: nn.Module) -> WholeModule:
        """A target as the layer's base. ValueError for a module that the method cannot act on."""
        raise NotImplementedError

    def around(
        self, layer: Any, name: str, inner: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], rows: Rows
    ) -> Any:
        """The output of a layer with the adapter `name`. inner: the module that the adapter wraps, called once with
        these arguments or others."""
        raise NotImplementedError

    def freeze(self, layer: Any, name: str) -> None:
        """Turn off gradients, once those of the adapter `name` were turned on or off, of what is never trained."""


def rows_of(value: Any, rows: Rows, batch: int) -> Any:
    """Those rows of a tensor whose first size is the batch's, also in tuples and lists; other values as they are."""
    if rows is None:
        return value
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value.index_select(0, torch.tensor(rows, device=value.device))
    if type(value) in (tuple, list):
        return type(value)(rows_of(part, rows, batch) for part in value)
    return value


def added_to_rows(y: Tensor, rows: Rows, added: Tensor) -> Tensor:
    """y with something added to some of its rows."""
    if rows is None:
        return y + added
    return y.index_add(0, torch.tensor(rows, device=y.device), added)
