"""transformers' way in for masks: models with our attention get a `LazyMask` in place of a T x S tensor.

`ALL_MASK_ATTENTION_FUNCTIONS` has a function for each kind of attention. While an accelerated model lives, its instance
has ours over "sdpa" and "eager", which serve the configurations of such models and call transformers' own for all else:
compilers and tracers, static caches, devices whose attention is not ours, and masks whose spans are not known. What
does not know of a `LazyMask` gets the real one from it, made by transformers' own function.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .description import Attention
from .masks import LazyMask
from .spans import mask_spans
from .ways import known_ways

_NAMES = ("sdpa", "eager")
_lock = threading.RLock()  # a configuration may die, and `_drop` run, within any line below
# id of a configuration -> itself, and the attention modules that have it
_served: dict[int, tuple[ref[Any], tuple[ref[nn.Module], ...]]] = {}


def serve(module: nn.Module, config: Any) -> None:
    """Masks that transformers makes for a configuration come as spans, as long as this attention module is accelerated.
    """
    with _lock:
        others = _modules(config)
        if config is not None and not any(other() is module for other in others):
            alive = (other for other in others if other() is not None)
            _served[id(config)] = ref(config, partial(_drop, id(config))), (*alive, ref(module))
            _install()


def leave(module: nn.Module) -> None:
    """The module is not accelerated any more."""
    with _lock:
        for number, (config, modules) in list(_served.items()):
            rest = tuple(other for other in modules if other() not in (None, module))
            if rest and config() is not None:
                _served[number] = config, rest
            else:
                _served.pop(number, None)
        if not _served:
            _remove()


def _drop(number: int, dead: ref[Any]) -> None:
    with _lock:
        found = _served.get(number)
        if found is not None and found[0] is dead:
            del _served[number]
            if not _served:
                _remove()


def _modules(config: Any) -> tuple[ref[nn.Module], ...]:
    found = _served.get(id(config))
    return found[1] if found is not None and found[0]() is config else ()


def _is_served(config: Any) -> bool:
    return any(module() is not None for module in _modules(config))


def _adds_masks(config: Any) -> bool:
    """True where eager code adds the mask that it is given, and nothing where it is given none: that of families whose
    attention is eager by default. Others' may count on a mask, and so does ALiBi."""
    parts = [module.__dict__["_fastpeft"].part for found in _modules(config) if (module := found()) is not None]
    return all(isinstance(part, Attention) and part.eager and not part.alibi for part in parts)


def _install() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    for name in _NAMES:
        own = functions[name]
        if not isinstance(own, _Mask):
            functions[name] = _Mask(name, own, name in getattr(functions, "_local_mapping", ()))


def _remove() -> None:
    library = sys.modules.get("transformers.masking_utils")
    functions = getattr(library, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    if functions is None:  # Python ends
        return
    for name in _NAMES:
        ours = functions[name]
        if isinstance(ours, _Mask):
            if ours.was_local:
                functions[name] = ours.own
            else:
                del functions[name]


class _Mask:
    """A function of `ALL_MASK_ATTENTION_FUNCTIONS`."""

    def __init__(self, name: str, own: Any, was_local: bool) -> None:
        self.name, self.own, self.was_local = name, own, was_local

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or torch.compiler.is_compiling() or not _is_served(kwargs.get("config")) or not _is_usual(kwargs):
            return self.own(*args, **kwargs)
        padding, first, keys = kwargs["attention_mask"], kwargs["kv_offset"], kwargs["kv_length"]
        if padding is not None and padding.shape[1] >= first + keys and bool(padding.all()):
            padding = None
        if padding is None and self._goes_without(kwargs):
            return None
        positions = torch.arange(kwargs["q_length"], device=kwargs["device"]) + kwargs["q_offset"]
        if torch.is_tensor(padding) and padding.device != positions.device:
            return self.own(**kwargs)
        spans = mask_spans(kwargs["mask_function"], padding, positions, first, keys)
        if spans is None:
            return self.own(**kwargs)
        shape = (kwargs["batch_size"], 1, kwargs["q_length"], keys)
        dtype = torch.bool if self.name == "sdpa" else kwargs["dtype"]
        whole = kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return LazyMask(spans, shape, dtype, partial(self.own, **whole))

    def _goes_without(self, kwargs: dict[str, Any]) -> bool:
        """True where transformers leaves the mask out, no position being padding: attention that is causal, or that
        sees all, without one. And for one query, the last, of eager attention, which sees all the keys."""
        size, queries, keys = kwargs.get("local_size"), kwargs["q_length"], kwargs["kv_length"]
        if size is not None and keys >= size:
            return False
        served = queries in (1, keys) if self.name == "sdpa" else queries == 1 and _adds_masks(kwargs["config"])
        return bool((kwargs.get("allow_is_causal_skip") and served) or kwargs.get("allow_is_bidirectional_skip"))


def _is_usual(kwargs: dict[str, Any]) -> bool:
    """True for a mask by positions that are numbers (those of a static cache are tensors) where attention is ours."""
    from transformers.utils.import_utils import is_tracing

    numbers = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")
    if not all(type(kwargs.get(name)) is int for name in numbers) or kwargs.get("use_vmap"):
        return False
    padding, dtype, device = kwargs.get("attention_mask"), kwargs.get("dtype"), kwargs.get("device")
    if type(device) is not torch.device or type(dtype) is not torch.dtype or dtype is torch.float64:
        return False
    if padding is not None and (type(padding) is not Tensor or padding.dim() != 2 or padding.dtype is not torch.bool):
        return False
    return (
        known_ways(device, dtype).attention and not torch._C._are_functorch_transforms_active()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None and not is_tracing(padding)
    )  # fmt: skip
