"""A switched module's part in this: its description, its own class, and what it keeps between calls."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from peft_kernels import PreparedCall, gated_mlp

from .angles import Angles
from .description import Part
from .masks import Masks
from .projections import KeptGiven, Linears
from .token import Kept, MlpToken, Tokens


@dataclass
class Shared:
    """Of all layers of a model: what the last forwards made for each of them."""

    angles: Angles = field(default_factory=Angles)
    masks: Masks = field(default_factory=Masks)

    def __reduce__(self) -> Any:
        """Copied and pickled empty, once for all the layers of a copy."""
        return Shared, ()


@dataclass
class State:
    part: Part
    base: Any  # the class that was there
    shared: Shared = field(default_factory=Shared)
    qkv: Linears = field(default_factory=Linears)
    o: Linears = field(default_factory=Linears)
    tokens: Tokens = field(default_factory=Tokens)  # of attention
    whole: Linears = field(default_factory=Linears)  # of an MLP, all of them
    mlp_token: Kept[MlpToken] = field(default_factory=Kept)
    mlp: PreparedCall = field(default_factory=lambda: PreparedCall(gated_mlp))
    given: KeptGiven = field(default_factory=KeptGiven)  # of a module whose MLP lies in it
    norm: PreparedCall | None = None  # made when it is first called
    config: Any = None  # of the model whose forward makes its masks, once they come as spans

    @property
    def names(self) -> list[str]:
        """Of the arguments of the class's own forward after the first."""
        return names_of(self.base.forward)


@cache
def names_of(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)[2:]
