"""Modules of a forward of their own, in which several projections of one input are one call and attention is ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .description import Together
from .interface import config_of, why_not
from .projections import Given, projections
from .state import State
from .ways import ways_of


def together_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    state: State = self._fastpeft
    of, ways = state.part, ways_of(hidden_states)
    assert isinstance(of, Together)
    names = tuple(name for name in of.names if getattr(self, name, None) is not None)
    found = config = None
    if ways.stack and len(names) > 1:
        found = projections(hidden_states, *(getattr(self, name) for name in names))
    # a graph sees the modules
    if of.attends and ways.attention and why_not(self, of) is None and not torch.compiler.is_compiling():
        config = config_of(self)
    itself = self
    if found is not None:
        itself = Given(self, names, hidden_states, state.qkv(hidden_states, *found), config)
    elif config is not None:
        itself = Given(self, (), hidden_states, (), config)
    return state.base.forward(itself, hidden_states, *args, **kwargs)
