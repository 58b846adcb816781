"""Our own 4-bit linear layer.

`NF4Linear` holds the bytes that bitsandbytes would hold, as plain buffers: nothing hangs on a Parameter subclass, so
the layer pickles, deep-copies and moves like any module, and its scales survive `.to(dtype)`. Its state dict has
bitsandbytes' pre-quantised keys (`weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`,
...), so a saved model loads in transformers with bitsandbytes, and theirs loads here without bitsandbytes.

Format and method: QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, dequantize_4bit, lora_linear, quantize_4bit
from peft_kernels.formats import make_tables

from .bnb_keys import as_modules, bnb_state, parse_bnb_state

_SCALES = ("absmax", "nested_absmax", "nested_code", "offset")


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is stored in 4 bits: `y = x W^T + bias` with x of [..., in_features].

    Buffers: `weight` (packed bytes, [ceil(in * out / 2), 1], as bitsandbytes shapes them), `absmax`, and when nested
    `nested_absmax`, `nested_code`, `offset`. `bias` is a Parameter that needs no gradient until asked to. The output
    has x's dtype; sums are float32. With `compute_dtype` x is cast to it first, as bitsandbytes does.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(
        self, weight: QuantWeight, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.register_buffer("weight", None)
        for name in _SCALES:
            self.register_buffer(name, None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.set_quant_weight(weight)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool = False, quant_type: str = "nf4", blocksize: int = 64,
        nested: bool = True, compute_dtype: torch.dtype | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> NF4Linear:  # fmt: skip
        """A layer to load a state dict into."""
        weight = quantize_4bit(torch.zeros(out_features, in_features, device=device), quant_type, blocksize, nested)
        held = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        return cls(replace(weight, dtype=dtype), held, compute_dtype)

    @classmethod
    def from_bnb(cls, layer: nn.Module) -> NF4Linear:
        """A layer over the bytes of a bitsandbytes `Linear4bit` (shared, not copied)."""
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "this bitsandbytes layer ran in eval mode on a CPU, which repacks its bytes; "
                "call fastpeft.weights.bnb.undo_cpu_packing(layer.weight) before converting it"
            )
        compute_dtype = layer.compute_dtype if isinstance(layer.compute_dtype, torch.dtype) else None
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        return cls(QuantWeight.from_bnb(layer.weight), bias, compute_dtype)

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
                packed=packed, absmax=absmax, shape=(self.out_features, self.in_features),
                quant_type=self.quant_type, blocksize=self.blocksize, dtype=self.dtype, nested_absmax=nested_absmax,
                nested_code=nested_code, nested_blocksize=self.nested_blocksize, offset=offset,
            )  # fmt: skip
            self.__dict__["_quant_weight"] = last
        return last

    def set_quant_weight(self, weight: QuantWeight) -> None:
        """Replace the weight. Its tensors are kept, not copied, so an old `quant_weight()` restores the exact bytes."""
        if self.sharded:
            raise ValueError("this NF4Linear is sharded: load, requantise or merge before `fully_shard_model`")
        if len(weight.shape) != 2:
            raise ValueError(f"NF4Linear needs a weight of shape (out_features, in_features), got {weight.shape}")
        self.out_features, self.in_features = (int(n) for n in weight.shape)
        self.quant_type, self.blocksize, self.dtype = weight.quant_type, weight.blocksize, weight.dtype
        self.nested_blocksize = weight.nested_blocksize
        self.weight = weight.packed.detach().view(-1, 1)
        self.absmax = weight.absmax
        self.nested_absmax, self.nested_code, self.offset = weight.nested_absmax, weight.nested_code, weight.offset
        self.__dict__.pop("_quant_weight", None)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

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

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense [out_features, in_features] tensor, by default in the dtype that it came in."""
        return dequantize_4bit(self.quant_weight(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None or self.compute_dtype == x.dtype:
            return lora_linear(x, self.quant_weight(), bias=self.bias)
        return lora_linear(x.to(self.compute_dtype), self.quant_weight(), bias=self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.quant_type}, blocksize={self.blocksize}{', nested' if self.nested else ''}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # `model.half()` and `.to(bfloat16)` reach every floating buffer; a rounded scale would be another weight.
        stores: tuple[dict[str, Any], ...] = (self._buffers, self._parameters)
        held = [(store, name, store.pop(name)) for store in stores for name in ("weight", *_SCALES) if name in store]
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "absmax", None)  # of a sharded layer; its key is bitsandbytes'
        destination.update({prefix + key: value for key, value in bnb_state(self.quant_weight()).items()})

    # torch.distributed.checkpoint (accelerate's way to the state of FSDP2) looks up keys of a state dict as names of
    # modules and their tensors, and loads no others. These three show it a module for `weight.absmax` and the like, by
    # its own protocol. It is nobody else's child: `children()` and `_modules` do not have it.
    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "keys_as_modules"}

    @property
    def keys_as_modules(self) -> nn.Module:
        """The state dict without `weight` and `bias`, as modules with buffers: `keys_as_modules.weight.absmax`."""
        return as_modules(bnb_state(self.quant_weight()))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            yield "keys_as_modules", self.keys_as_modules

    def children(self) -> Iterator[nn.Module]:
        return iter(())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        mine = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix + "weight")}
        others = {k: v for k, v in state_dict.items() if not k.startswith(prefix + "weight")}
        assign = self.weight.is_meta or local_metadata.get("assign_to_params_buffers", False)
        metadata = {**local_metadata, "assign_to_params_buffers": assign}
        lacking: list[str] = []
        super()._load_from_state_dict(others, prefix, metadata, strict, lacking, unexpected_keys, error_msgs)
        missing_keys += [key for key in lacking if key == prefix + "bias"]
        if "weight" not in mine:
            missing_keys.append(prefix + "weight")
            return
        try:
            weight = parse_bnb_state(mine, prefix)
            if tuple(weight.shape) != (shape := (self.out_features, self.in_features)):
                found = f"a 4-bit weight of {tuple(weight.shape)}, the layer is {shape}"
                raise ValueError(f"size mismatch for {prefix}weight: {found}")
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))
            return
        if not assign:  # as for parameters: a copy on the layer's own device, not the caller's tensors
            held = {name: getattr(weight, name) for name in ("packed", *_SCALES)}
            own: Any = {n: t.to(self.weight.device, copy=True) for n, t in held.items() if t is not None}
            weight = replace(weight, **own)
        self.set_quant_weight(weight)
