"""Norms of any family that is described."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels import PreparedCall, layer_norm, rms_norm

from .description import Norm
from .state import State
from .ways import ways_of


def norm_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state: State = self._fastpeft
    of = state.part
    assert isinstance(of, Norm)
    own = self._parameters
    weight = own["weight"] if "weight" in own else getattr(self, "weight", None)
    # a graph has its own fusions
    if args or kwargs or _reason(self, of, weight, x.dtype) or torch.compiler.is_compiling() or not ways_of(x).norm:
        whole: Tensor = state.base.forward(self, x, *args, **kwargs)
        return whole
    eps = getattr(self, of.eps)
    given = (weight, getattr(self, "bias", None), eps) if of.mean else (weight, eps, of.offset)
    function: Any = layer_norm if of.mean else rms_norm
    if torch.is_grad_enabled():
        return function(x, *given)  # type: ignore[no-any-return]
    if state.norm is None:
        state.norm = PreparedCall(function)
    return state.norm(x, *given)  # type: ignore[no-any-return]


def why_not(self: Any, of: Norm, dtype: torch.dtype) -> str | None:
    """Why the norm is the model's own code, in words for a report."""
    return _reason(self, of, getattr(self, "weight", None), dtype)


def _reason(self: Any, of: Norm, weight: Tensor | None, dtype: torch.dtype) -> str | None:
    if of.served is not None and not of.served(self):
        return "a variant of the family that is not described"
    if weight is not None and weight.dim() != 1:
        return "it has a weight for each head"
    if dtype is torch.float64:
        return "it is in float64"
    return "its weight is of another dtype than its input" if weight is not None and weight.dtype is not dtype else None
