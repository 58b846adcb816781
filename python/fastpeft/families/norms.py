"""Norms of any family that is described."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels import PreparedCall, layer_norm, rms_norm

from ..weights.base import acts_in_calls
from ..weights.lookups import Lookups
from .description import Norm
from .ways import ways_of


def norm_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state: Any = self._fastpeft
    of = state.part
    assert isinstance(of, Norm)
    own = self._parameters
    weight = own["weight"] if "weight" in own else getattr(self, "weight", None)
    # a graph has its own fusions
    if args or kwargs or _reason(self, of, weight, x.dtype) or torch.compiler.is_compiling() or not ways_of(x).norm:
        whole: Tensor = state.base.forward(self, x, *args, **kwargs)
        return whole
    given = _given(self, of, weight)
    function: Any = layer_norm if of.mean else rms_norm
    if state.norm is None:
        state.norm = PreparedCall(function)
    return state.norm(x, *given)  # type: ignore[no-any-return]


def prepared(module: Any, x: Tensor, lookups: Lookups) -> Any:
    """The prepared call of a norm for x, without gradients; None where it has to be called as a module. Noted is what
    was looked at."""
    state: Any = module.__dict__.get("_fastpeft")
    of = None if state is None else state.part
    own: Any = getattr(type(module), "forward", None)
    if not isinstance(of, Norm) or of.served is not None or own is not norm_forward or acts_in_calls(module):
        return None
    weight = module._parameters.get("weight")
    if weight is None or of.eps not in module.__dict__ or _reason(module, of, weight, x.dtype) or not ways_of(x).norm:
        return None
    lookups.calls_of(module)
    lookups.entries(module.__dict__, "_fastpeft", of.eps)
    lookups.entries(module._parameters, "weight", "bias")
    function: Any = layer_norm if of.mean else rms_norm
    return PreparedCall(function).ready(x, *_given(module, of, weight))


def _given(module: Any, of: Norm, weight: Tensor | None) -> tuple[Any, ...]:
    eps = getattr(module, of.eps)
    return (weight, getattr(module, "bias", None), eps) if of.mean else (weight, eps, of.offset)


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
