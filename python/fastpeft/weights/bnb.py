"""bitsandbytes' quantised layers as base weights. bitsandbytes is imported only to write one."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

import peft_kernels
from peft_kernels import QuantWeight

from ..files.offloaded import brought
from .base import BaseWeight, Saved, has_base, has_hooks
from .lookups import Lookups
from .nf4 import Quant4bitWeight


class Bnb4bitWeight(Quant4bitWeight):
    """Linear4bit: its bytes are read in place by the kernels.

    bitsandbytes' own forward repacks the bytes for its CPU kernel, with a loss in nested scales, whenever it runs in
    eval mode on a CPU with AVX512-BF16. So the base is computed by `peft_kernels`, which reads the standard layout; a
    layer that was already repacked is converted back once.
    """

    label, quantized = "Linear4bit", "bnb 4bit"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return has_base(module, "Linear4bit", "bitsandbytes")

    def check(self) -> None:
        weight = self.module.weight
        if getattr(weight, "quant_state", None) is None and weight.device.type != "meta":
            raise ValueError("a bitsandbytes Linear4bit that is not quantised: move the model to its device first")

    def quant(self) -> QuantWeight:
        with brought(self.module):
            weight = self.module.weight
        if weight.quant_state is None:
            weight.quant_state = getattr(self.module, "quant_state", None)
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            undo_cpu_packing(weight)
        return QuantWeight.from_bnb(weight)

    def tensors(self) -> list[Tensor]:
        _, *scales = self.quant().flatten()[:5]
        return [self.module.weight, *(t for t in scales if t is not None)]

    def _store(self, w: Tensor, like: QuantWeight) -> None:
        bnb: Any = importlib.import_module("bitsandbytes")
        self._replace(bnb.nn.Params4bit(
            w.to("cpu", like.dtype), requires_grad=False, blocksize=like.blocksize, compress_statistics=like.nested,
            quant_type=like.quant_type, quant_storage=self.module.weight.quant_storage, module=self.module,
        ))  # fmt: skip

    def _replace(self, weight: Any) -> None:
        self.module._parameters["weight"] = weight = weight.to(self.module.weight.device)
        self.module.quant_state = weight.quant_state
        weight.module = self.module

    def save(self) -> Saved:
        self.quant()  # undoes a repacking, so that what is kept is the standard layout
        return BaseWeight.save(self)

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if args or kwargs or has_hooks(module) or module.weight.requires_grad:
            return module(x, *args, **kwargs)  # type: ignore[no-any-return]
        compute = getattr(module, "compute_dtype", None) or x.dtype
        bias = None if module.bias is None else module.bias.to(compute)
        return peft_kernels.lora_linear(x.to(compute), self.quant(), bias=bias).to(x.dtype)

    def fast(self) -> Callable[[], Tensor | QuantWeight | None] | None:
        module = self.module
        parameters, hooks, pre = module._parameters, module._forward_hooks, module._forward_pre_hooks
        own = vars(module)
        held: Any = None
        state: Any = None
        qw: QuantWeight | None = None

        def weight() -> QuantWeight | None:
            nonlocal held, state, qw
            w = parameters.get("weight")
            if w is None or w.requires_grad or hooks or pre or "forward" in own:
                return None
            # The state object tells a requantised or repacked weight from the one that was seen last.
            if qw is None or w is not held or w.quant_state is not state or not is_view(qw, w, state):
                qw = self.quant()
                held, state = w, w.quant_state
            return qw

        return weight

    def note(self, lookups: Lookups) -> None:
        lookups.calls_of(self.module)
        lookups.entries(self.module._parameters, "weight")
        note_view(self.module.weight, lookups)


_views: WeakKeyDictionary[nn.Module, tuple[ReferenceType[Tensor], QuantWeight]] = WeakKeyDictionary()


def quant_view(module: nn.Module) -> QuantWeight | None:
    """The bytes of a frozen Linear4bit as kernels read them, the same object while they are where they were; None for
    other modules and where the module has to be called (trained, or with another forward)."""
    own = type(module)
    if own.__name__ != "Linear4bit" or not own.__module__.startswith("bitsandbytes.") or "forward" in vars(module):
        return None
    weight: Any = module.weight
    if weight.requires_grad or getattr(weight, "quant_state", None) is None:
        return None
    held = _views.get(module)
    same: Any = held is not None and held[0]() is weight
    if held is None or not same or not is_view(held[1], weight, weight.quant_state):
        _views[module] = held = ref(weight), Bnb4bitWeight(module).quant()
    return held[1]


def is_view(qw: QuantWeight, weight: Any, state: Any) -> bool:
    """True while a view of a `Params4bit` shows its bytes and scales: all of them may be replaced in place."""
    if getattr(state, "packing_format_for_cpu", False) or state.absmax is not qw.absmax:
        return False
    nested = state.state2 if getattr(state, "nested", False) else None
    if nested is not None and (
        nested.absmax is not qw.nested_absmax or nested.code is not qw.nested_code or state.offset is not qw.offset
    ):
        return False
    return (nested is None) is (qw.nested_absmax is None) and weight.data_ptr() == qw.packed.data_ptr()  # type: ignore[no-any-return]


def note_view(weight: Any, lookups: Lookups) -> None:
    """Note what `is_view` looks at, and the state that it is given."""
    state = weight.quant_state
    lookups.entries(vars(weight), "quant_state")
    lookups.entries(vars(state), "packing_format_for_cpu", "absmax", "nested", "state2", "offset")
    if getattr(state, "nested", False):
        lookups.entries(vars(state.state2), "absmax", "code")
    lookups.memory_of(weight)


_repacking = threading.Lock()


def undo_cpu_packing(weight: Any) -> None:
    """Bring a `Params4bit` that bitsandbytes repacked for its CPU kernel back into the standard layout, in place.

    The packing rounded the scales to bfloat16 and dropped the nested ones; they stay plain float32 here, since
    quantising them again would lose more. (bitsandbytes' own way back leaves plain scales transposed.)
    """
    functional: Any = importlib.import_module("bitsandbytes.functional")
    with _repacking:
        if not getattr(weight.quant_state, "packing_format_for_cpu", False):
            return  # another thread has brought it back
        state = copy.copy(weight.quant_state)
        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax, state.nested, state.state2 = scales, False, None
        weight.data = data
        weight.quant_state = state  # last: who sees it takes the bytes as they are
