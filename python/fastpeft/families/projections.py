"""Linear layers of a model as the kernels take them, several in a call: q, k and v, or gate and up, of one input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import PreparedCall, Projection, QuantWeight, lora_linear, lora_linear_stacked

from ..layer.by_row import train as trained_rows
from ..layer.by_row.call import now
from ..layer.layer import AdapterLayer
from ..methods.fused import FusedProjection
from ..weights.base import acts_in_calls
from ..weights.bnb import note_view, quant_view
from ..weights.lookups import Lookups
from ..weights.nf4_linear import NF4Linear


def projection(module: Any, dtype: torch.dtype) -> Projection | str:
    """A linear layer as the kernels take it, for x of `dtype`; a reason where it has to be called as a module: adapters
    other than a single plain LoRA, hooks, a base that is computed in another dtype, weights that train. Layers of PEFT
    that `fastpeft.patch` took over and Linear4bit of bitsandbytes are such layers too. `note` has its lookups.
    """
    if acts_in_calls(module):
        return _HOOKS
    if type(module) is NF4Linear:
        given = module.compute_dtype in (None, dtype)
        return Projection(module.quant_weight(), bias=module.bias) if given else _OTHER_DTYPE
    layer = _adapter_layer(module)
    if layer is None:
        if getattr(module, "compute_dtype", dtype) not in (None, dtype):
            return _OTHER_DTYPE
        weight = quant_view(module)
        return _PLAIN if weight is None else Projection(weight, bias=module.bias)
    # the plan is made here where it is not there yet: a first call must compute what the second will (checkpointing)
    plan = layer.plan()
    if not isinstance(plan, FusedProjection):
        return _NO_PLAN
    if plan.compute not in (None, dtype):
        return _OTHER_DTYPE
    found = plan.projection()
    return _UNREADABLE if found is None else found


def note(module: Any, lookups: Lookups) -> None:
    """Note what `projection` looks at where it finds one."""
    lookups.calls_of(module)
    if type(module) is NF4Linear:
        lookups.entries(vars(module), "compute_dtype")
        lookups.entries(module._parameters, "bias")
        module.note(lookups)
    elif type(module) is AdapterLayer:
        module.note(lookups)
        plan = module.plan()
        if isinstance(plan, FusedProjection):
            plan.note(lookups)
            return
    elif _adapter_layer(module) is None:
        if quant_view(module) is None:  # nothing to find
            lookups.refuse()
            return
        lookups.entries(vars(module), "compute_dtype")
        lookups.entries(module._parameters, "weight", "bias")
        note_view(module.weight, lookups)
    else:
        lookups.refuse()


class Linears:
    """Linear layers of one input, call after call. call: of them together.

    What the modules said in the last call without gradients is kept, and asked for again once one of its lookups would
    find something else: so decoding takes no Python for each layer. Copied and pickled empty.
    """

    def __init__(self) -> None:
        self.call = PreparedCall(lora_linear_stacked)
        self._kept: _Kept | None = None

    def __reduce__(self) -> Any:
        return Linears, ()

    def projections(self, x: Tensor, modules: Sequence[Any]) -> list[Projection] | None:
        """`projections(x, *modules)`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or now.state.call is not None:
            return projections(x, *modules)
        kept = self._kept
        if kept is None or not kept.of(x, modules):
            found = projections(x, *modules)
            if found is not None:
                self._kept = _Kept(x, modules)
            return found
        if kept.found is not None and kept.lookups.hold():
            return kept.found
        found = projections(x, *modules)
        if kept.lookups.keeps:
            # asked for between two looks, as another thread may change the layers
            self._kept = kept.with_these(found) if kept.lookups.hold() else None
        return found


class _Kept:
    """The projections of modules, found: None until they were asked for after `lookups` were noted."""

    def __init__(self, x: Tensor, modules: Sequence[Any]) -> None:
        self._dtype, self._modules = x.dtype, modules
        self.found: list[Projection] | None = None
        self.lookups = Lookups()
        for module in modules:
            note(module, self.lookups)

    def of(self, x: Tensor, modules: Sequence[Any]) -> bool:
        mine = self._modules
        return self._dtype is x.dtype and len(mine) == len(modules) and all(map(is_, mine, modules))

    def with_these(self, found: list[Projection] | None) -> _Kept:
        """The same with them, as threads share what is there."""
        new = copy.copy(self)
        new.found = found
        return new


_HOOKS = "hooks listen to its calls"
_OTHER_DTYPE = "it computes in another dtype than the model"
_PLAIN = "neither an adapter nor a frozen 4-bit weight"
_UNREADABLE = "its weight trains, or its adapter is not as kernels take it"
_NO_PLAN = "no single plain LoRA is active"


def refusal(module: Any, dtype: torch.dtype) -> str | None:
    """Why a linear layer has to be called as a module, in words for a report; None where it need not."""
    found = projection(module, dtype)
    layer = _adapter_layer(module)
    if found is not _NO_PLAN or layer is None:
        return found if isinstance(found, str) else None
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged"
    names = [type(layer.methods[name]).__name__ for name in layer._active_adapter if name in layer.methods]
    return f"{_NO_PLAN}: {' and '.join(names)}" if names else "no adapter of it is active"


def _adapter_layer(module: Any) -> AdapterLayer | None:
    """The layer that computes a module with adapters: itself, or what `fastpeft.patch` gave to one of PEFT's."""
    if type(module) is AdapterLayer:
        return module
    find = getattr(type(module), "fastpeft_layer", None)
    return None if find is None else find(module)  # type: ignore[no-any-return]


def projections(x: Tensor, *modules: Any) -> list[Projection] | None:
    """Those of all modules, or None."""
    if torch.compiler.is_compiling():  # a graph sees the modules
        return None
    found = []
    for module in modules:
        one = projection(module, x.dtype)
        if type(one) is str:
            return None
        found.append(one)
    return found  # type: ignore[return-value]  # no str is among them


def children(module: Any, names: Sequence[str]) -> list[Any]:
    """Attributes of a module, which are modules as a rule: torch looks for these last."""
    own = module._modules
    return [own[name] if name in own else getattr(module, name) for name in names]


def modules_on(x: Tensor, *modules: Any) -> Sequence[Tensor]:
    """`module(x)` of each; adapters by row in training are one node of the graph."""
    if all(type(module) is AdapterLayer and not acts_in_calls(module) for module in modules):
        together = trained_rows.linears(x, modules)
        if together is not None:
            return together
    return [module(x) for module in modules]


def stacked(of: Linears, x: Tensor, *modules: Any) -> Sequence[Tensor]:
    """`module(x)` of each: one call of a kernel where that serves them all."""
    found = of.projections(x, modules)
    ys: Sequence[Tensor] = modules_on(x, *modules) if found is None else of.call(x, *found)
    return ys


def _by_row(x: Tensor, modules: Sequence[Any]) -> Sequence[Tensor] | None:
    """`module(x)` of layers whose rows have adapters of their own, where each is one call of a kernel; else None."""
    found = []
    for module in modules:
        routed = module.rows.by_name() if type(module) is AdapterLayer and not acts_in_calls(module) else None
        y = None if routed is None else routed.quick(x)
        if y is None:
            return None
        found.append(y)
    return found


def _one_token(module: Any, x: Tensor) -> Tensor:
    """`module(x)` for x [M, K], rows of one token: whoever listens gets [M, 1, K], as from the model's own code."""
    if type(module) is nn.Linear and not acts_in_calls(module):
        return module(x)  # type: ignore[no-any-return]
    return module(x.unsqueeze(1)).squeeze(1)  # type: ignore[no-any-return]


def linears(of: Linears, x: Tensor, launches: bool, *modules: Any) -> Sequence[Tensor]:
    """`module(x)` of each for x [M, K] without gradients, as one call of a kernel and without the modules around it.

    launches: of `Ways`. A stack pays over dense weights, too, then, and one projection has kernels of its own.
    """
    found = of.projections(x, modules)
    if found is None:
        by_row = _by_row(x, modules)
        if by_row is not None:
            return by_row
    if found is None or any(p.dropout_p or not (launches or type(p.weight) is QuantWeight) for p in found):
        return [_one_token(module, x) for module in modules]
    if launches and len(found) == 1:
        return (lora_linear(x, *found[0]),)
    ys: Sequence[Tensor] = of.call(x, *found)
    return ys


class Given:
    """A module to its own forward, with others in place of some attributes: other layers, another configuration.

    So a model's own code runs on as it is, and what it calls in several places is computed in one.
    """

    def __init__(self, module: Any, others: Mapping[str, Any]) -> None:
        self.__dict__.update(others, _module=module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self, *args, **kwargs)

    __call__ = forward

    def __getattr__(self, name: str) -> Any:  # of what is not in `__dict__`
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)


class KeptGiven:
    """A module's `Given`, call after call: decoding waits for each object that is made again, and for each attribute
    that is looked for in two modules. Copied and pickled empty."""

    def __init__(self) -> None:
        self._kept: tuple[Lookups, Given] | None = None  # whole, as threads share it

    def __reduce__(self) -> Any:
        return KeptGiven, ()

    def now(self) -> Given | None:
        """The one that was kept, if it still holds."""
        kept = self._kept
        return kept[1] if kept is not None and kept[0].hold() else None

    def keep(self, lookups: Lookups, given: Given | None) -> None:
        """lookups: made before `given`, as another thread may change the module."""
        self._kept = (lookups, given) if given is not None and lookups.keeps and lookups.hold() else None


def in_one_call(module: Any, names: Sequence[str], x: Tensor, of: Linears) -> dict[str, Any]:
    """Layers for `Given` in place of those that all read x: the first one asked computes all of them, in one call.

    None of them where they are called as modules. They are asked in any order, each once; for another input, or once
    more, it is the layer itself that is called.
    """
    layers = [getattr(module, name) for name in names]
    found = of.projections(x, layers) if len(names) > 1 else None
    if found is None:
        return {}
    shared = _OneCall(x, of.call, found)
    return {name: _Answer(layer, shared, i) for i, (name, layer) in enumerate(zip(names, layers, strict=True))}


class _OneCall:
    """The outputs of layers for x, made when the first is asked for."""

    def __init__(self, x: Tensor, call: PreparedCall, found: Sequence[Projection]) -> None:
        self._x, self._prepared, self._found = x, call, found
        self._ys: list[Tensor | None] = []

    def take(self, index: int, x: Tensor) -> Tensor | None:
        if x is not self._x:
            return None
        if not self._ys:
            self._ys = list(self._prepared(x, *self._found))
        y, self._ys[index] = self._ys[index], None  # let go of here, as the model's own code lets go of it
        return y


class _Answer:
    """A layer whose output for one input comes from such a call."""

    def __init__(self, module: Callable[..., Any], shared: _OneCall, index: int) -> None:
        self._of, self._shared, self._index = module, shared, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self._shared.take(self._index, args[0]) if len(args) == 1 and not kwargs else None
        return self._of(*args, **kwargs) if y is None else y

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)
