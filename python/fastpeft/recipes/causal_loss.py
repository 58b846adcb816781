"""The loss of any language model of transformers by chunks, within the model's own forward.

With `labels` given, the head hands on `LazyLogits` for the time of the forward. All that a family does to its logits
and its loss is its own code: caps, scales, shifted labels, `num_items_in_batch`, losses of routers, `logits_to_keep`.
The class of the model is a subclass of the same name, so that what asks for the class or its name gets the answer it
got before; parameters, keys and files are not touched.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..families.switch import is_switched
from ..files.whole import is_in_unit, is_partitioned
from ..layer.layer import AdapterLayer
from ..weights.base import is_listened_to
from .lazy_logits import LazyLogits, Watch, _Head, state_of

_CACHE = {"use_cache", "past_key_values", "position_ids"}
_LOSS = "_fastpeft_loss"  # a class with this forward has it, as its model has a Watch by this name


class _Stand:
    """Stands for the forward of a head while its model's forward runs in some threads: there `deferred`, in others what
    stood in the module's own dictionary before, if anything did."""

    def __init__(self, head: Any) -> None:
        self.head, self.before = head, head.__dict__.get("forward")
        self.users = 0
        self._here = threading.local()

    @property
    def deferred(self) -> _Deferred | None:
        """This thread's."""
        return getattr(self._here, "deferred", None)

    @deferred.setter
    def deferred(self, value: _Deferred | None) -> None:
        self._here.deferred = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = type(self.head).forward.__get__(self.head) if self.before is None else self.before
        return (self.deferred or own)(*args, **kwargs)


_standing = threading.Lock()


@contextmanager
def _stand(head: Any) -> Iterator[_Stand]:
    """Within this, a `_Stand` is the head's forward: one for all threads."""
    own = head.__dict__
    with _standing:
        found = own.get("forward")
        stand = own["forward"] = found if type(found) is _Stand else _Stand(head)
        stand.users += 1
    try:
        yield stand
    finally:
        with _standing:
            stand.users -= 1
            if not stand.users and own.get("forward") is stand:
                if stand.before is None:
                    del own["forward"]
                else:
                    own["forward"] = stand.before


class _Deferred:
    """The forward of a head in one forward of its model."""

    def __init__(self, stand: _Stand, watch: Watch) -> None:
        self.stand, self.head, self.watch = stand, stand.head, watch
        self.matrix = stand.before is None and _is_matrix(self.head)
        self.called = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The head's own output, also while this stands for its forward."""
        before, self.stand.deferred = self.stand.deferred, None
        try:
            return self.head(*args, **kwargs)
        finally:
            self.stand.deferred = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(hidden, Tensor) or type(hidden) is LazyLogits or hidden.dim() < 2 or not hidden.numel():
            self.watch.all_at_once("the head is called with something else than hidden states")
            return self.run(*args, **kwargs)
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        autocast = None if hidden.dtype is torch.float64 else autocast
        matrix = self.matrix and (autocast is not None or hidden.dtype is self.head.weight.dtype)
        grad = torch.is_grad_enabled()
        head = _Head(self.head, self.run, matrix, grad, autocast, self.watch, state_of(self.head))
        if matrix:
            return LazyLogits(hidden, head, self.head.weight.shape[0], autocast or hidden.dtype)
        with torch.no_grad():  # its width and dtype, of one row
            one = head.run(hidden[(0,) * (hidden.dim() - 2)][:1], ())
        return LazyLogits(hidden, head, one.shape[-1], one.dtype)


def _is_matrix(head: Any) -> bool:
    """True for a plain linear layer whose matrix can be read slice by slice."""
    if type(head) is not nn.Linear and not (type(head).__base__ is nn.Linear and is_switched(head)):
        return False
    tensors = [t for t in (head.weight, head.bias) if t is not None]
    return head.weight.dim() == 2 and all(type(t) in (nn.Parameter, Tensor) for t in tensors)


def _not_now(head: nn.Module | None) -> str | None:
    """A reason why this call has to run the model's own forward."""
    if head is None:
        return "it has no head now"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func runs"
    for module in head.modules():
        if is_listened_to(module):
            return "there are hooks on its head, which would see other calls"
        if isinstance(module, AdapterLayer) and module.rows.given():
            return "the rows of its head have adapters or values of their own"
        if is_in_unit(module) or any(is_partitioned(p) for p in module._parameters.values() if p is not None):
            return "DeepSpeed ZeRO-3 or FSDP has the parameters of its head in parts"
    return None


def _forward(self: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    watch: Watch = self.__dict__[_LOSS]
    head = self.get_output_embeddings()
    why = _not_now(head)
    if why is not None:
        watch.whole[why] += 1
        return own(self, *args, **kwargs)
    if self.training and torch.is_grad_enabled() and not args and not kwargs.keys() & _CACHE:
        # A step of training reads no keys and values again, and attention is quicker without. With position_ids it is
        # the cache that decides if transformers looks for packed sequences in them.
        kwargs = kwargs | {"use_cache": False} if "use_cache" in _names(own) else kwargs
    with _inside(head, watch) as deferred:
        output = own(self, *args, **kwargs)
        if not deferred.called:
            watch.all_at_once("the model's forward does not call its head")
    return output


@contextmanager
def _inside(head: Any, watch: Watch) -> Iterator[_Deferred]:
    with _stand(head) as stand:
        before, stand.deferred = stand.deferred, _Deferred(stand, watch)
        here = threading.get_ident()
        inner = here in watch.inside
        watch.inside.add(here)
        try:
            yield stand.deferred
        finally:
            stand.deferred = before
            if not inner:
                watch.inside.discard(here)


@functools.cache
def _names(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)


def _place_of_labels(forward: Any) -> int | None:
    names = _names(forward)
    return names.index("labels") - 1 if "labels" in names else None


@functools.cache
def _with_loss(base: Any) -> type:
    own, place = base.forward, _place_of_labels(base.forward)
    assert place is not None

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels") if len(args) <= place else args[place]
        if labels is None or torch.compiler.is_compiling():  # a graph has its own ways to save memory
            return own(self, *args, **kwargs)
        return _forward(self, own, args, kwargs)

    members = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__,
               "__doc__": base.__doc__, "__reduce_ex__": _reduce, _LOSS: None}  # fmt: skip
    return type(base.__name__, (base,), members)


def _reduce(self: Any, protocol: int) -> Any:
    """Pickled and copied as a model of the class that was there, with this one put on again."""
    return _again, (type(self).__base__,), self.__dict__


def _again(base: type) -> Any:
    made: Any = _with_loss(base)
    return made.__new__(made)


def _is_served(module: nn.Module) -> bool:
    return _LOSS in type(module).__dict__


def language_models(model: nn.Module) -> list[Any]:
    """The outermost models of transformers in `model` that have a head for tokens and take labels."""
    library = sys.modules.get("transformers")
    if library is None:
        return []
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if not isinstance(module, library.PreTrainedModel) or any(_below(name, above) for above, _ in found):
            continue
        if _place_of_labels(type(module).forward) is not None and module.get_output_embeddings() is not None:
            found.append((name, module))
    return [module for _, module in found]


def _below(name: str, above: str) -> bool:
    return not above or name.startswith(above + ".")


def put_loss(model: nn.Module) -> tuple[int, list[str]]:
    """Give the language models in `model` the loss by chunks: how many have it now, and why others have not."""
    found, reasons = language_models(model), []
    if not found:
        reasons.append(f"{type(model).__name__}: no model of transformers with a head for tokens that takes labels")
    served = 0
    for module in found:
        if "forward" in module.__dict__:
            reasons.append(f"{type(module).__name__}: its forward was replaced (by TRL or accelerate, say): "
                           "call this before, with the model as it was loaded")  # fmt: skip
            continue
        served += 1
        if not _is_served(module):
            module.__class__ = _with_loss(module.__class__)
            module.__dict__[_LOSS] = Watch()
    return served, reasons


def watches(model: nn.Module) -> list[Watch]:
    return [module.__dict__[_LOSS] for module in model.modules() if _is_served(module)]


def take_loss(model: nn.Module) -> int:
    """Take back what `put_loss` did: of how many models."""
    count = 0
    for module in model.modules():
        if _is_served(module):
            module.__class__ = type(module).__bases__[0]
            del module.__dict__[_LOSS]
            count += 1
    return count
