"""MLPs of any family that is described: one function that keeps its input and the first products' outputs alone."""

from __future__ import annotations

import dis
import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import Projection, QuantWeight, gated

from ..layer.by_row.call import now
from ..weights.base import acts_in_calls, has_hooks
from ..weights.lookups import Lookups
from .attention import after, dropout_of
from .description import Mlp, Spread
from .projections import Given, children, linears, modules_on, projections, stacked
from .state import State
from .token import MlpToken, in_4_bits, note_mlp
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
    if acts_in_calls(module):
        return None
    cls: Any = type(module)
    name = _of_class(cls)
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return name


@functools.cache
def _of_class(cls: Any) -> str | None:
    """By a class's name; somebody's own class of that name may compute another thing."""
    return _ACTS.get(cls.__name__) if cls.__module__.startswith(("torch.", "transformers.")) else None


def act_in(self: Any, of: Mlp) -> str | None:
    """The op's name of an MLP's activation, None as of `act_of`."""
    found = attribute(self, of.act)
    return act_of(found) if found is not None else (of.act if of.act in _ACTS.values() else None)


def mlp_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state: State = self._fastpeft
    of = state.part
    assert isinstance(of, Mlp)
    token = state.mlp_token.kept
    if token is not None and not args and not kwargs and token.serves(self, of, x):
        return after(self, of.after, token.call.run(x))
    residual = (args[0] if args else kwargs.get("residual")) if of.residual else None
    usual = len(args) + len(kwargs) == (residual is not None)
    act = act_in(self, of) if ways_of(x).mlp and usual else None
    if act is None or (of.served and not of.served(self)) or (of.cast and _is_cast(x, getattr(self, of.down))):
        whole: Tensor = state.base.forward(self, x, *args, **kwargs)
        return whole
    *up, down = children(self, (*of.up, of.down))
    if of.between and dropout_of(self, of.between):
        h = _activated(stacked(state.qkv, x, *up), act, of, limit_of(self, of))
        y = modules_on(after(self, of.between, h), down)[0]
    else:
        y = _computed(state, of, x, act, up, down, limit_of(self, of))
        if x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and state.mlp_token.due():
            state.mlp_token.kept = _token(self, state, of, x)
    return _added(self, of, y, residual)


def _token(self: Any, state: State, of: Mlp, x: Tensor) -> MlpToken | None:
    """The call of a token as it is kept, x [B, 1, K] without gradients; None where something else may be looked at."""
    if of.residual or of.cast or torch.compiler.is_compiling() or now.state.call is not None:
        return None
    lookups = Lookups()
    note_mlp(self, of, lookups)
    act = act_in(self, of)
    *up, down = children(self, (*of.up, of.down))
    found = projections(x, *up, down)
    if act is None or self.training or ways_of(x).launches or not lookups.keeps or not in_4_bits(found):
        return None
    call = state.mlp.ready(x, *_arguments(of, found, act, limit_of(self, of)))
    # looked at once more, as another thread may change the layers
    return MlpToken(call, lookups, x) if call is not None and lookups.hold() else None


def _arguments(of: Mlp, found: list[Projection], act: str, limit: float) -> tuple[Any, ...]:
    """Of `gated_mlp`, after x."""
    gate, *second = found[:-1]
    return gate, second[0] if second else None, found[-1], act, _fused(of), None, limit


def limit_of(self: Any, of: Mlp) -> float:
    limit: float = getattr(self, of.limit) if of.limit else 0.0
    return limit


def _computed(state: State, of: Mlp, x: Tensor, act: str, up: list[Any], down: Any, limit: float = 0.0) -> Tensor:
    token, few = not torch.is_grad_enabled() and x.dim() == 3 and x.shape[1] == 1, ways_of(x).launches
    found = None if token and few else state.whole.projections(x, (*up, down))
    if token and (found is None or not all(type(p.weight) is QuantWeight for p in found)):
        h = _activated(linears(state.qkv, x[:, 0], few, *up), act, of, limit)
        return linears(state.o, h, few, down)[0].unsqueeze(1)
    if found is None:
        return modules_on(_activated(modules_on(x, *up), act, of, limit), down)[0]
    y: Tensor = state.mlp(x, *_arguments(of, found, act, limit))
    return y


def _is_cast(x: Tensor, down: Any) -> bool:
    dtype: torch.dtype = down.weight.dtype
    return dtype.is_floating_point and dtype is not x.dtype


def spread_method(base: type, of: Spread) -> Any:
    """The method of such a class with its MLP as one call, under the signature of the family's own."""
    own = getattr(base, of.method)
    plain = not of.between and not any("." in path for path in (*of.up, of.act, of.down))
    names = _reads(own) if plain else frozenset()

    @functools.wraps(own)
    def method(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        state: State = self._fastpeft
        if not ways_of(x).mlp:
            return own(self, x, *args, **kwargs)
        quick = plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        given: Any = state.given.now() if quick else None
        if given is None:
            lookups, read = _noted(self, of, names) if quick else (None, {})
            others = _in_one(self, state, of)
            given = self if others is None else _given(self, read | others)
            if lookups is not None:
                state.given.keep(lookups, None if others is None else given)
        return own(given, x, *args, **kwargs)

    return method


def _reads(method: Any) -> frozenset[str]:
    """Attributes, of whatever objects, that a method's code reads and never writes. A `Given` that is kept holds them
    itself: each would else be looked for in two modules, for every token."""
    steps = [*dis.get_instructions(inspect.unwrap(method))]
    written = {step.argval for step in steps if step.opname in ("STORE_ATTR", "DELETE_ATTR")}
    return frozenset(step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")) - written


def _noted(module: Any, of: Spread, names: frozenset[str]) -> tuple[Lookups, dict[str, Any]]:
    """Lookups of what `_in_one` looks at and of the attributes of these names, and these attributes."""
    lookups, read = Lookups(), {}
    for held in (module._modules, module.__dict__):
        for name in names & held.keys():
            lookups.entries(held, name)
            read[name] = held[name]
    lookups.entries(module._modules, *of.up, of.act, of.down)
    act = module._modules.get(of.act)
    if act is None:
        lookups.refuse()
    else:
        lookups.calls_of(act)
        lookups.entries(vars(act), "approximate")
    return lookups, read


def _in_one(self: Any, state: State, of: Spread) -> dict[str, Any] | None:
    """Path -> a function for the layer there: the last computes the MLP of what the others hand on."""
    act = act_in(self, of)
    around = (attribute(self, path.rpartition(".")[0]) for path in (*of.up, of.act, of.down) if "." in path)
    if act is None or (of.between and dropout_of(self, of.between)) or any(map(has_hooks, around)):
        return None
    up, down = [attribute(self, path) for path in of.up], attribute(self, of.down)

    def whole(x: Tensor) -> Tensor:
        return _computed(state, of, x, act, up, down)

    return {of.up[0]: _handed_on, of.act: _handed_on, of.down: whole}


def _handed_on(x: Tensor) -> Tensor:
    return x


def _given(module: Any, others: dict[str, Any]) -> Given:
    own: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, other in others.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = other
        else:
            own[name] = other
    return Given(module, own | {name: _given(getattr(module, name), inner) for name, inner in below.items()})


def attribute(module: Any, path: str) -> Any:
    """The value at a path of attributes; None where there is none."""
    return functools.reduce(lambda found, name: getattr(found, name, None), path.split("."), module)


def _added(self: Any, of: Mlp, y: Tensor, residual: Tensor | None) -> Tensor:
    y = after(self, of.after or of.residual, y)
    return y if residual is None else residual + y


def _fused(of: Mlp) -> str | None:
    return "halves" if of.halves else None


def _activated(ys: Any, act: str, of: Mlp, limit: float) -> Tensor:
    return gated(ys[0], ys[1] if len(ys) > 1 else None, act=act, fused=_fused(of), limit=limit)

