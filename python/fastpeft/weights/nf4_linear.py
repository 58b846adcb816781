"""Our own quantised linear layer: NF4 and FP4, and the other formats of `peft_kernels.formats`.

The state dict of an `NF4Linear` has bitsandbytes' pre-quantised keys (`weight`, `weight.absmax`, `weight.quant_map`,
`weight.quant_state.bitsandbytes__nf4`, ...), so a saved model loads in transformers with bitsandbytes, and theirs loads
here without bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, dequantize_4bit, lora_linear, quantize_4bit

from .bnb_keys import as_modules, bnb_state, parse_bnb_state
from .nf4_store import SCALES, NF4Store


class NF4Linear(NF4Store):
    """A frozen linear layer over a quantised weight: `y = x W^T + bias` with x of [..., in_features].

    The weight may have any format of `QuantWeight`, blocks of a mapped GGUF file too; NF4 and FP4 are what
    `quantize_model` makes.

    `bias` is a Parameter that needs no gradient until asked to. The output has x's dtype; sums are float32. With
    `compute_dtype` x is cast to it first, as bitsandbytes does.
    """

    def __init__(
        self, weight: QuantWeight, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
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

    def set_quant_weight(self, weight: QuantWeight) -> None:
        if len(weight.shape) != 2:
            raise ValueError(f"NF4Linear needs a weight of shape (out_features, in_features), got {weight.shape}")
        super().set_quant_weight(weight)
        self.out_features, self.in_features = self.shape

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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_bnb:
            self.save_parts(destination, prefix)
            return
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
        if not self.is_bnb:
            others = {k: v for k, v in others.items() if k not in {prefix + name for name in SCALES}}
        assign = self.weight.is_meta or local_metadata.get("assign_to_params_buffers", False)
        metadata = {**local_metadata, "assign_to_params_buffers": assign}
        lacking: list[str] = []
        super()._load_from_state_dict(others, prefix, metadata, strict, lacking, unexpected_keys, error_msgs)
        missing_keys += [key for key in lacking if key == prefix + "bias"]
        if "weight" not in mine:
            missing_keys.append(prefix + "weight")
            return
        try:
            if not self.is_bnb:
                self.load_parts(state_dict, prefix, assign)
                return
            weight = parse_bnb_state(mine, prefix)
            if tuple(weight.shape) != (shape := (self.out_features, self.in_features)):
                found = f"a 4-bit weight of {tuple(weight.shape)}, the layer is {shape}"
                raise ValueError(f"size mismatch for {prefix}weight: {found}")
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))
            return
        self.load_quant_weight(weight, assign)
