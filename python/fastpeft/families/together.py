"""Modules of a forward of their own, in which several projections of one input are one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .description import Together
from .projections import Given, projections
from .state import State
from .ways import ways_of


def together_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    state: State = self._fastpeft
    of = state.part
    assert isinstance(of, Together)
    names = tuple(name for name in of.names if getattr(self, name, None) is not None)
    found = None
    if ways_of(hidden_states).stack and len(names) > 1:
        found = projections(hidden_states, *(getattr(self, name) for name in names))
    itself = self if found is None else Given(self, names, hidden_states, state.qkv(hidden_states, *found))
    return state.base.forward(itself, hidden_states, *args, **kwargs)
