"""Experts of every mixture of transformers: the tokens of all experts in one product each, with adapters or without.

transformers marks the classes whose experts are 3-D parameters (`use_experts_implementation`) and says of each how they
lie; one forward serves them all, so no family describes its experts. Adapters of `target_parameters` come as factors
(`weights.read_by_module.EXPERT_FACTORS`), and no merged weight of all experts is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import gated, grouped_linear

from ..weights.parameters_4bit import quant_of
from ..weights.quantised_rows import size_of_one
from ..weights.read_by_module import EXPERT_FACTORS
from .description import Experts
from .mlp import act_of
from .state import State
from .ways import ways_of

EXPERTS = Experts()


def why_not(module: Any) -> str | None:
    """The reason why a module of such a class keeps its own forward, whatever its input is."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")):
        return "it does not say how its experts lie"
    for name in _names(module):
        quant = quant_of(module, name)
        if quant is not None:
            if len(quant.shape) != 3 or size_of_one(quant) % quant.blocksize:
                return f"{name}: the 4-bit blocks of an expert are not whole"
            continue
        weight: Any = getattr(module, name, None)
        if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 3 or not weight.is_floating_point():
            return f"{name} is no dense tensor of all experts"
    return None


def _names(module: Any) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def experts_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state: State = self._fastpeft
    factors = self.__dict__.get(EXPERT_FACTORS) or {}
    given = dict(zip(state.names, args, strict=False), **kwargs)
    routed = [given.get(name) for name in state.names[:2]]
    usual = len(given) == 2 and hidden_states.dim() == 2 and all(isinstance(t, Tensor) for t in routed)
    # factors are this forward's own: they came because it takes them, and the reference serves wherever no kernel does
    if not factors and (not usual or not ways_of(hidden_states).experts or why_not(self) is not None):
        whole: Tensor = state.base.forward(self, hidden_states, *args, **kwargs)
        return whole
    if not usual:
        raise TypeError(f"{type(self).__name__}: takes hidden_states [tokens, features], the experts of each token and "
                        "their weights where its experts have adapters")  # fmt: skip
    index, weights = routed
    assert index is not None
    assert weights is not None
    chosen = index.shape[-1]
    experts, order = index.reshape(-1).sort(stable=True)
    # of each expert its first row; those of an expert that is elsewhere (expert parallelism) have a larger number
    numbers = torch.arange(self.num_experts + 1, device=experts.device)
    offsets = torch.searchsorted(experts, numbers)
    first, second = _names(self)
    h = _product(self, first, hidden_states.index_select(0, order // chosen), offsets, factors)
    h = _activated(self, h)
    y = _product(self, second, h, offsets, factors)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    # in the order of tokens again: every row is written once
    y = torch.empty_like(y).index_copy(0, order, y).view(*index.shape, y.shape[1])
    out: Tensor = (y * weights.unsqueeze(-1)).sum(-2).to(hidden_states.dtype)
    return out


def _product(self: Any, name: str, x: Tensor, offsets: Tensor, factors: dict[str, Any]) -> Tensor:
    quant = quant_of(self, name)
    weight = getattr(self, name) if quant is None else quant
    a, b, scaling = factors.get(name, (None, None, 1.0))
    bias = getattr(self, f"{name}_bias") if self.has_bias else None
    return grouped_linear(x, weight, offsets, a, b, scaling, bias, transposed=self.is_transposed)


def _activated(self: Any, h: Tensor) -> Tensor:
    if not self.has_gate:
        act = act_of(self.act_fn)
        return _tensor(self.act_fn(h) if act is None else gated(h, act=act))
    act = act_of(self.act_fn) if _usual_gate(self) else None
    if act is not None:
        gate, up = h.chunk(2, dim=-1)
        return _tensor(gated(gate, up, act=act))
    return _tensor(self._apply_gate(h))


def _tensor(t: Any) -> Tensor:
    assert isinstance(t, Tensor)
    return t


def _usual_gate(self: Any) -> bool:
    """True of `act(gate) * up` of two halves: transformers' own function for classes that have none."""
    return bool(self.is_concatenated) and type(self)._apply_gate.__module__ == "transformers.integrations.moe"
