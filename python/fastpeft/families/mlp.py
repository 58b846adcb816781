"""MLPs of any family that is described: one function that keeps its input and the first products' outputs alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import gated, gated_mlp

from ..weights.base import is_listened_to
from .attention import after
from .description import Mlp
from .projections import linears, modules_on, projections
from .state import State
from .ways import ways_of

# Classes of activations, of transformers and of torch -> the op's name of each.
_ACTS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh", "BloomGelu": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu", "ReLU": "relu", "ReLUSquaredActivation": "relu2",
}  # fmt: skip


def act_of(module: Any) -> str | None:
    """The op's name of an activation, a module or torch's function; None for one that it does not have, or that hooks
    listen to."""
    if not isinstance(module, nn.Module):
        return "silu" if module is F.silu else None
    if is_listened_to(module):
        return None
    name = _ACTS.get(type(module).__name__)
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name


def act_in(self: Any, of: Mlp) -> str | None:
    """The op's name of an MLP's activation, None as of `act_of`."""
    found = getattr(self, of.act, None)
    return act_of(found) if found is not None else (of.act if of.act in _ACTS.values() else None)


def mlp_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state: State = self._fastpeft
    of = state.part
    assert isinstance(of, Mlp)
    residual = (args[0] if args else kwargs.get("residual")) if of.residual else None
    usual = len(args) + len(kwargs) == (residual is not None)
    act = act_in(self, of) if ways_of(x).mlp and usual else None
    if act is None or (of.served and not of.served(self)):
        whole: Tensor = state.base.forward(self, x, *args, **kwargs)
        return whole
    down = getattr(self, of.down)
    up = [getattr(self, name) for name in of.up]
    limit = getattr(self, of.limit) if of.limit else 0.0
    if not torch.is_grad_enabled() and x.dim() == 3 and x.shape[1] == 1:  # decoding
        few = ways_of(x).launches
        h = _activated(linears(state.qkv, x[:, 0], few, *up), act, of, limit)
        return _added(self, of, linears(state.o, h, few, down)[0].unsqueeze(1), residual)
    found = projections(x, *up, down)
    if found is not None:
        gate, *second = found[:-1]
        y = gated_mlp(x, gate, second[0] if second else None, found[-1], act=act, fused=_fused(of), limit=limit)
    else:
        y = modules_on(_activated(modules_on(x, *up), act, of, limit), down)[0]
    return _added(self, of, y, residual)


def _added(self: Any, of: Mlp, y: Tensor, residual: Tensor | None) -> Tensor:
    y = after(self, of.after or of.residual, y)
    return y if residual is None else residual + y


def _fused(of: Mlp) -> str | None:
    return "halves" if of.halves else None


def _activated(ys: Any, act: str, of: Mlp, limit: float) -> Tensor:
    return gated(ys[0], ys[1] if len(ys) > 1 else None, act=act, fused=_fused(of), limit=limit)

