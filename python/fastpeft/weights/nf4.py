"""4-bit layers as base weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels
from peft_kernels import QuantWeight
from peft_kernels.formats import QUANT_TYPES

from ..files.offloaded import brought
from .base import BaseWeight, Saved, Weight, put_back, relative_error
from .lookups import Lookups
from .nf4_store import NF4Store
from .quantised_rows import no_quantiser, quantised_rows, requantised


class Quant4bitWeight(BaseWeight):
    """A linear layer with the protocol `quant_weight()` and `set_quant_weight(qw)`: fastpeft's NF4Linear."""

    label = "NF4Linear"
    quantized = "nf4"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        # `in_features`: what keeps the bytes of another module's parameter (NF4Parameter) is no layer
        return all(hasattr(module, name) for name in ("quant_weight", "set_quant_weight", "in_features"))

    @property
    def refusal(self) -> str | None:  # type: ignore[override]
        return no_quantiser(self.quant().quant_type)

    def quant(self) -> QuantWeight:
        with brought(self.module):
            return self.module.quant_weight()  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.quant().shape)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.module, "compute_dtype", None) or self.quant().dtype

    def read(self) -> Weight:
        return peft_kernels.dequantize_4bit(self.quant(), dtype=torch.float32), self.bias

    def rows(self, index: slice | Tensor) -> Tensor:
        found = quantised_rows(self.quant(), index)
        return super().rows(index) if found is None else found

    def write(self, w: Tensor, b: Tensor | None) -> float | None:
        w = w.detach().to(torch.float32)
        self._store(w, self.quant())
        self._write_bias(b)
        return relative_error(self.read()[0], w)

    def _store(self, w: Tensor, like: QuantWeight) -> None:
        if like.quant_type not in QUANT_TYPES:
            self._replace(requantised(w, like))
            return
        new = peft_kernels.quantize_4bit(
            w, quant_type=like.quant_type, blocksize=like.blocksize, nested=like.nested,
            nested_blocksize=like.nested_blocksize,
        )  # fmt: skip
        self._replace(replace(new, dtype=like.dtype))

    def _replace(self, weight: Any) -> None:
        self.module.set_quant_weight(weight.to(self.quant().device))

    def save(self) -> Saved:
        # `set_quant_weight` replaces the tensors and never writes into them, so these stay what they are.
        return {"weight": self.quant(), "bias": self.module._parameters.get("bias")}

    def restore(self, saved: Saved) -> None:
        self._replace(saved["weight"])
        put_back(self.module, {"bias": saved["bias"]})

    def fast(self) -> Callable[[], Tensor | QuantWeight | None] | None:
        module = self.module
        hooks, pre, own = module._forward_hooks, module._forward_pre_hooks, vars(module)
        quant: Callable[[], QuantWeight] = module.quant_weight

        def weight() -> QuantWeight | None:
            return None if hooks or pre or "forward" in own else quant()

        return weight

    def note(self, lookups: Lookups) -> None:
        module = self.module
        lookups.calls_of(module)
        if isinstance(module, NF4Store):
            module.note(lookups)
        else:
            lookups.refuse()
