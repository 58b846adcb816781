"""Modules of a forward of their own, in which several projections of one input are one call and attention is ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .description import Together
from .interface import asking
from .projections import Given, in_one_call
from .state import State
from .ways import ways_of


def together_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    state: State = self._fastpeft
    of, x = state.part, hidden_states
    assert isinstance(of, Together)
    names = tuple(name for name in of.names if getattr(self, name, None) is not None)
    if of.other:
        other = (kwargs | dict(zip(state.names, args, strict=False)) if args else kwargs).get(of.other)
        if other is not None:
            x, names = other, names[1:]
    others = in_one_call(self, names, x, state.qkv) if ways_of(x).stack else {}
    others |= asking(self, of, hidden_states)
    itself = Given(self, others) if others else self
    return state.base.forward(itself, hidden_states, *args, **kwargs)
