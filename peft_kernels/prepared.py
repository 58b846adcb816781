"""Prepared calls: what a call's arguments beside x need is looked at, and packed for the kernel, once.

A kernel leaves little of Python in the caches, so that each object that a call touches beside it costs a miss: checks,
choices and 20 arguments of an autograd.Function took a fifth of a step of a small layer. A `PreparedCall` keeps what
its last call found, and this is the one place that says how long that holds: while the arguments beside x are the same
objects, their memory is where it was and in the form that it had, x has the same dtype and width, the same backends are
forced, and nothing that has to be frozen wants a gradient. Values may change: the kernel reads them at each call.
Memory that is freed or cut (`untyped_storage().resize_`) is memory elsewhere, which is seen; what is not seen is a
storage that was freed and then taken again, smaller and where it was, between two calls.

An op takes part with a subclass of `Prepared` in `ops/<op>/prepared.py` (`native.py` of the op packs), announced by
`prepares`. Only the native CPU backend has such a form; whatever it cannot serve is the public function's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from .checks import PLAIN, arg_error, in_memory
from .dispatch import BackendUnavailable, Op, dispatch_observed, forced_backends, servable
from .native import addresses

_records = torch.is_grad_enabled  # torch's module takes longer than this
Arguments = tuple[Any, ...]
Bind = Callable[[Tensor, Arguments], "Prepared | None"]
_binds: dict[Callable[..., Any], tuple[Bind | None, Bind | None]] = {}  # without gradients, and with them


class Places:
    """Tensors as they are now: where in memory, and in which form. `t.data = other` changes them under the same object.

    Their form is what graphs of torch are guarded by: types, dtypes, sizes, strides, whether gradients are wanted, and
    the dispatcher's state. One call in C++ looks at them in a fifth of the time that Python's attributes take.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._addresses = tensors, addresses(tensors)
        sizes, strides = [[*t.shape] for t in tensors], [[*t.stride()] for t in tensors]
        guards: Any = TensorGuards
        self._alike: Callable[..., bool] = guards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check

    def unchanged(self) -> bool:
        return addresses(self._tensors) == self._addresses and self._alike(*self._tensors)


class Prepared:
    """A call whose arguments beside x were checked and packed.

    tensors: what the kernel reads of them. saved: of these, what a backward reads. frozen: those that must not want a
    gradient. stack: more that the kernel reads, whose form never changes. given: the arguments, one by one,
    but for one that is another in each call; arguments: as they came, where all of them last.
    """

    given: Arguments
    arguments: Arguments | None = None

    def __init__(
        self, x: Tensor, tensors: Sequence[Tensor], saved: Sequence[Tensor] = (),
        frozen: Sequence[Tensor | None] = (), stack: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.forced, self.dtype, self.k = forced_backends(), x.dtype, x.shape[-1]
        self.tensors, self.places = tensors, Places(tensors)
        self.saved, self.addresses = saved, addresses(saved)
        self.stack, self.stack_at = stack, addresses(stack)
        self.frozen = [t for t in frozen if t is not None]

    def holds(self, x: Tensor, given: Arguments) -> bool:
        """True if it serves this call."""
        return (
            self.dtype is x.dtype and x.dim() > 0 and self.k == x.shape[-1] and self.forced is forced_backends()
            and (given is self.given or _same(given, self.given)) and self.places.unchanged()
            and not (self.frozen and any(map(_wants_gradient, self.frozen)))
            and (not self.stack or addresses(self.stack) == self.stack_at)
        )  # fmt: skip

    def holds_backward(self, dy: Tensor, x: Tensor, saved: Sequence[Tensor]) -> bool:
        """True if the backward may take what was packed: hooks of saved tensors put others in their places."""
        return (
            type(dy) is Tensor and not dispatch_observed() and self.forced is forced_backends()
            and addresses(saved) == self.addresses and x.dtype is self.dtype and x.is_contiguous()
            and in_memory(x) and in_memory(dy)
        )  # fmt: skip

    def serves(self, x: Tensor) -> bool:
        """True if it serves the call with the same arguments for this x."""
        return servable(x) and self.holds(x, self.given)

    def run(self, x: Tensor) -> Any:
        """The call. x: as `holds` wants it."""
        raise NotImplementedError

    def run_with(self, x: Tensor, own: Any) -> Any:
        """The call of a function in `_OWN`; own: its argument of this call. None: it is the public function's."""
        raise NotImplementedError


def _same(these: Arguments, those: Arguments) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


_wants_gradient: Callable[[Tensor], bool] = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _projections(arguments: Arguments) -> Arguments:
    return tuple(chain.from_iterable(arguments))


def _rows(arguments: Arguments) -> Arguments:
    return tuple(chain.from_iterable((p.weight, *p.a, *p.b, *p.scaling, p.plan, p.bias, p.dropout_p)
                                     for p in arguments))  # fmt: skip


def _mlp(arguments: Arguments) -> Arguments:
    gate, up, down, *options = arguments
    return (*gate, *(up or ()), *down, *options)


# The functions that can be prepared; for those that take projections, their arguments one by one.
_ONE_BY_ONE: dict[str, Callable[[Arguments], Arguments] | None] = {
    "dora_linear": None,
    "dora_linear_normed": None,
    "gated_mlp": _mlp,
    "layer_norm": None,
    "lora_linear": None,
    "lora_linear_by_row": _rows,
    "lora_linear_stacked": _projections,
    "lora_mixture": None,
    "multi_lora_linear": None,
    "rms_norm": None,
}
_OF_SEVERAL = {"lora_linear_by_row", "lora_linear_stacked"}  # take a sequence of projections
# Of a function, the place of the argument beside x that is another one in each call, and is looked at in each.
_OWN = {"lora_mixture": 3}


class PreparedCall:
    """A function of this package for one layer, call after call: `call(x, *arguments)` is `function(x, *arguments)`.

    function: `lora_linear`, `dora_linear`, `dora_linear_normed`, `gated_mlp`, `multi_lora_linear`, `rms_norm` or
    `layer_norm`; `lora_mixture`, whose `mix` may be another in each call; `lora_linear_stacked` or
    `lora_linear_by_row`, which are then called as `call(x, *projections)`. Arguments beside x have their places.
    Without gradients each but `dora_linear_normed` and `lora_linear_by_row` is prepared; with
    gradients these two, `lora_linear`, `lora_linear_stacked`, `gated_mlp` and the norms are, whose weights and biases
    are frozen then. Errors are the function's. A copy, or a pickle, is a call that has not been made. Threads may share
    one: what it keeps is never written to.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__name__", "")
        if name not in _ONE_BY_ONE:
            raise arg_error("PreparedCall", "function", f"one of {', '.join(_ONE_BY_ONE)}", repr(function))
        self._function, self._one_by_one, self._own = function, _ONE_BY_ONE[name], _OWN.get(name)
        self._several = name in _OF_SEVERAL
        self._last: list[Prepared | None] = [None, None]

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedCall, (self._function,)

    def ready(self, x: Tensor, *arguments: Any) -> Prepared | None:
        """The prepared call that serves x with these arguments, now; None where the function has to be called."""
        if not servable(x):
            return None
        one_by_one, own, graph = self._one_by_one, self._own, _records()
        last = self._last[graph]
        if last is not None and last.arguments is not None and _same(arguments, last.arguments):
            given = last.given
        else:
            given = arguments if one_by_one is None else one_by_one(arguments)
            if own is not None:
                given = (*arguments[:own], *arguments[own + 1 :])
        if last is None or not last.holds(x, given):
            bind = _bind_of(self._function, graph)
            last = None if bind is None else bind(x, arguments)
            if last is not None:
                last.given, last.arguments = given, arguments if own is None else None
            self._last[graph] = last  # whole, as other threads may take it
        return last

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        last = self.ready(x, *arguments)
        if last is not None:
            y = last.run(x) if self._own is None else last.run_with(x, arguments[self._own])
            if y is not None:
                return y
        return self._function(x, arguments) if self._several else self._function(x, *arguments)


def _bind_of(function: Callable[..., Any], graph: bool) -> Bind | None:
    if function not in _binds:
        op = ".".join(function.__module__.split(".")[:3])  # peft_kernels.ops.<op>
        importlib.import_module(f"{op}.prepared")  # announces it
    return _binds[function][graph]


def prepares(function: Callable[..., Any], inference: Bind | None, training: Bind | None = None) -> None:
    """Announce how a function's calls are prepared. A bind returns None for arguments that are not to be kept."""
    _binds[function] = inference, training


def plain(*tensors: Tensor | None) -> list[Tensor] | None:
    """Those that there are, if a kernel can read each where it is, whatever a graph does with it; else None."""
    found = [t for t in tensors if t is not None]
    if PLAIN.issuperset(map(type, found)) and all(t.is_contiguous() and t.is_leaf for t in found):
        return found
    return None  # what a graph made is no leaf: it would live on with what is kept


def native_serves(*calls: tuple[Op, tuple[Any, ...]]) -> bool:
    """True if these calls of operators are sound and the native backend's. Errors come from the public function."""
    try:
        with torch.no_grad():
            for op, args in calls:
                op.examine(args)
                if op.choose(args).name != "native":
                    return False
    except (BackendUnavailable, TypeError, ValueError):
        return False
    return True
