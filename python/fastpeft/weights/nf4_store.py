"""A quantised weight as buffers of a module.

The bytes that its owner holds (bitsandbytes, a GGUF file), as plain buffers: nothing hangs on a Parameter subclass, so
a module pickles, deep-copies and moves like any other, and its scales survive `.to(dtype)`. Format of NF4: QLoRA (arXiv
2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.formats import QUANT_TYPES, make_tables

from .lookups import Lookups

SCALES = ("absmax", "nested_absmax", "nested_code", "offset")


class NF4Store(nn.Module):
    """A module that holds a quantised weight of any format of `peft_kernels.formats`.

    Buffers: `weight` (packed bytes, [ceil(numel / 2), 1], as bitsandbytes shapes them), `absmax`, and when nested
    `nested_absmax`, `nested_code`, `offset`. shape: of the weight.
    """

    weight: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", None)
        for name in SCALES:
            self.register_buffer(name, None, persistent=False)

    def quant_weight(self) -> QuantWeight:
        """The weight as the kernels take it; shares the buffers and is rebuilt only when one of them was replaced."""
        held: Any = self._buffers if "weight" in self._buffers else {**self._buffers, **self._parameters}
        packed, absmax, nested_absmax = held["weight"], held["absmax"], held["nested_absmax"]
        nested_code, offset = held["nested_code"], held["offset"]
        last: QuantWeight | None = self.__dict__.get("_quant_weight")
        if (
            last is None or last.packed is not packed or last.absmax is not absmax or last.offset is not offset
            or last.nested_absmax is not nested_absmax or last.nested_code is not nested_code
        ):  # fmt: skip
            last = QuantWeight(
                packed=packed, absmax=absmax, shape=self.shape,
                quant_type=self.quant_type, blocksize=self.blocksize, dtype=self.dtype, nested_absmax=nested_absmax,
                nested_code=nested_code, nested_blocksize=self.nested_blocksize, offset=offset,
            )  # fmt: skip
            self.__dict__["_quant_weight"] = last
        return last

    def note(self, lookups: Lookups) -> None:
        """Note what `quant_weight` looks at, after a call of it."""
        lookups.entries(self._buffers, "weight", *SCALES)
        lookups.entries(self.__dict__, "_quant_weight")  # dropped with each new form of the weight
        if "weight" not in self._buffers:
            lookups.refuse()

    def set_quant_weight(self, weight: QuantWeight) -> None:
        """Replace the weight. Its tensors are kept, not copied, so an old `quant_weight()` restores the exact bytes."""
        if self.sharded:
            what = type(self).__name__
            raise ValueError(f"this {what} is sharded: load, requantise or merge before `fully_shard_model`")
        self.shape = tuple(int(n) for n in weight.shape)
        self.quant_type, self.blocksize, self.dtype = weight.quant_type, weight.blocksize, weight.dtype
        self.nested_blocksize = weight.nested_blocksize
        self.weight = weight.packed.detach().view(-1, 1)
        self.absmax = weight.absmax
        self.nested_absmax, self.nested_code, self.offset = weight.nested_absmax, weight.nested_code, weight.offset
        self.__dict__.pop("_quant_weight", None)

    def load_quant_weight(self, weight: QuantWeight, assign: bool) -> None:
        """Take a weight of a state dict: its tensors themselves, or (as for parameters) copies on the own device."""
        if not assign:
            held = {name: getattr(weight, name) for name in ("packed", *SCALES)}
            own: Any = {n: t.to(self.weight.device, copy=True) for n, t in held.items() if t is not None}
            weight = replace(weight, **own)
        self.set_quant_weight(weight)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None and self.is_bnb

    @property
    def is_bnb(self) -> bool:
        """True of NF4 and FP4, whose keys of a state dict are bitsandbytes'."""
        return self.quant_type in QUANT_TYPES

    def save_parts(self, destination: dict[str, Any], prefix: str) -> None:
        """Put the parts beside `weight` into a state dict, of a format that has no keys of bitsandbytes."""
        destination.update({prefix + name: t for name in SCALES if (t := self._buffers.get(name)) is not None})

    def load_parts(self, state: dict[str, Any], prefix: str, assign: bool) -> None:
        """Take what `save_parts` and `weight` gave. ValueError or TypeError where it does not fit this layer."""
        parts: dict[str, Any] = {name: state.get(prefix + name) for name in SCALES}
        packed = state[prefix + "weight"]
        self.load_quant_weight(replace(self.quant_weight(), packed=packed, **parts), assign)

    @property
    def sharded(self) -> bool:
        """True once `share_parameters` was called."""
        return "weight" in self._parameters

    def share_parameters(self) -> None:
        """Hold `weight` and `absmax` as frozen parameters from now on, which FSDP2 shards; buffers it would not."""
        for name in ("weight", "absmax"):
            if name in self._buffers:
                held = self._buffers.pop(name)
                self._non_persistent_buffers_set.discard(name)
                assert held is not None
                self._parameters[name] = nn.Parameter(held, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `model.half()` and `.to(bfloat16)` reach every floating buffer; a rounded scale would be another weight.
        stores: tuple[dict[str, Any], ...] = (self._buffers, self._parameters)
        held = [(store, name, store.pop(name)) for store in stores for name in ("weight", *SCALES) if name in store]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for store, name, old in held:
                store[name] = old
        for store, name, old in held:
            if old is not None:
                new = fn(old)
                new = new if new.dtype == old.dtype else old.to(new.device)
                store[name] = new if store is self._buffers else nn.Parameter(new, requires_grad=False)
        make_tables(self.weight)  # where they are needed, before a first call that may be captured
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_quant_weight"}
