"""Experts of every mixture of transformers: the tokens of all experts in one product each, with adapters or without.

transformers marks the classes whose experts are 3-D parameters (`use_experts_implementation`) and says of each how they
lie; one forward serves them all, so no family describes its experts. Adapters of `target_parameters` come as factors
(`weights.read_by_module.EXPERT_FACTORS`), and no merged weight of all experts is made.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import gated, grouped_linear
from peft_kernels.dispatch import servable

from ..weights.parameters_4bit import quant_of
from ..weights.quantised_rows import size_of_one
from ..weights.read_by_module import EXPERT_FACTORS
from .description import Experts
from .mlp import act_of
from .state import State
from .ways import ways_of

EXPERTS = Experts()
FEW = 4  # tokens whose experts are sorted by Python: each of torch's calls takes as long


def why_not(module: Any, of: Experts) -> str | None:
    """The reason why a module of such a class keeps its own forward, whatever its input is."""
    said = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
    if not of.every and not all(hasattr(module, name) for name in said):
        return "it does not say how its experts lie"
    if of.every and act_of(module.act_fn) is None:
        return f"the activation is {type(module.act_fn).__name__}"
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
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


def experts_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state: State = self._fastpeft
    of = state.part
    assert isinstance(of, Experts)
    factors = self.__dict__.get(EXPERT_FACTORS) or {}
    given = dict(zip(state.names, args, strict=False), **kwargs)
    routed = [] if of.every else [given.get(name) for name in state.names[:2]]
    usual = len(given) == len(routed) and hidden_states.dim() == 2 and all(isinstance(t, Tensor) for t in routed)
    # factors are this forward's own: they came because it takes them, and the reference serves wherever no kernel does
    if not factors and (not usual or not ways_of(hidden_states).experts or why_not(self, of) is not None):
        whole: Tensor = state.base.forward(self, hidden_states, *args, **kwargs)
        return whole
    if not usual:
        raise TypeError(f"{type(self).__name__}: takes hidden_states [tokens, features], the experts of each token and "
                        "their weights where its experts have adapters")  # fmt: skip
    if of.every:
        return _of_every(self, of, hidden_states)
    index, weights = routed
    assert index is not None
    assert weights is not None
    few = len(hidden_states) <= FEW and servable(hidden_states, index)
    rows, offsets, order = (_sorted_few if few else _sorted)(index, self.num_experts)
    y = _experts(self, of, hidden_states.index_select(0, rows), offsets, factors)
    # in the order of tokens again: every row is written once
    y = torch.empty_like(y).index_copy(0, order, y).view(*index.shape, y.shape[1])
    out: Tensor = (y * weights.unsqueeze(-1)).sum(-2).to(hidden_states.dtype)
    return out


def _sorted(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of each token, index [tokens, chosen], in order: (the token of each row, of each expert its first
    row, the choice that each row is of). An expert that is elsewhere (expert parallelism) has a larger number: its rows
    are the last, and of no group."""
    experts, order = index.reshape(-1).sort(stable=True)
    return order // index.shape[-1], _offsets(experts, num_experts), order


def _sorted_few(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_sorted` without torch."""
    experts, chosen = index.reshape(-1).tolist(), index.shape[-1]
    order = sorted(range(len(experts)), key=experts.__getitem__)
    counts = [0] * (num_experts + 1)
    for expert in experts:
        if expert < num_experts:
            counts[expert + 1] += 1
    return torch.tensor([i // chosen for i in order]), torch.tensor([*accumulate(counts)]), torch.tensor(order)


def _offsets(experts: Tensor, num_experts: int) -> Tensor:
    return torch.searchsorted(experts, torch.arange(num_experts + 1, device=experts.device))


def _of_every(self: Any, of: Experts, x: Tensor) -> Tensor:
    """Of x [E T, features], the rows of each expert in turn. Rows of zeros give zeros, and zero gradients."""
    rows = x.detach().ne(0).any(-1).nonzero().squeeze(-1)
    offsets = _offsets(rows // (x.shape[0] // self.num_experts), self.num_experts)
    y = _experts(self, of, x.index_select(0, rows), offsets, {})
    return torch.zeros_like(x).index_copy(0, rows, y)


def _experts(self: Any, of: Experts, x: Tensor, offsets: Tensor, factors: dict[str, Any]) -> Tensor:
    """The outputs for rows x [M, features], those of each expert in turn."""
    first, second = _names(self)
    h = _activated(self, of, _product(self, of, first, x, offsets, factors))
    y = _product(self, of, second, h, offsets, factors)
    return _tensor(self.post_expert_norm(y)) if getattr(self, "has_post_expert_norm", False) else y


def _product(self: Any, of: Experts, name: str, x: Tensor, offsets: Tensor, factors: dict[str, Any]) -> Tensor:
    quant = quant_of(self, name)
    weight = getattr(self, name) if quant is None else quant
    a, b, scaling = factors.get(name, (None, None, 1.0))
    bias = getattr(self, f"{name}_bias") if getattr(self, "has_bias", False) else None
    transposed = of.every or self.is_transposed
    return grouped_linear(x, weight, offsets, a, b, scaling, bias, transposed=transposed)


def _activated(self: Any, of: Experts, h: Tensor) -> Tensor:
    act = act_of(self.act_fn) if hasattr(self, "act_fn") else "silu"  # a gate with an alpha has no module for it
    if not getattr(self, "has_gate", True):
        return _tensor(self.act_fn(h) if act is None else gated(h, act=act))
    if act is None or not (of.every or of.limit or _usual_gate(self)):
        return _tensor(self._apply_gate(h))
    return gated(
        h, act=act, fused="halves" if of.every or self.is_concatenated else "pairs", shift=of.shift,
        alpha=getattr(self, of.alpha) if of.alpha else None, limit=getattr(self, of.limit) if of.limit else 0.0,
    )  # fmt: skip


def _tensor(t: Any) -> Tensor:
    assert isinstance(t, Tensor)
    return t


def _usual_gate(self: Any) -> bool:
    """True of `act(gate) * up` of two halves: transformers' own function for classes that have none."""
    return bool(self.is_concatenated) and type(self)._apply_gate.__module__ == "transformers.integrations.moe"
