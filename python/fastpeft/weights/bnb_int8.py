"""bitsandbytes' int8 layers as base weights. bitsandbytes is imported only to write one."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.formats import from_bnb_int8

from .base import BaseWeight, Saved, has_base, put_back
from .foreign import CodedWeight


class _Int8(BaseWeight):
    label, quantized = "Linear8bitLt", "bnb 8bit"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return has_base(module, "Linear8bitLt", "bitsandbytes")


class Bnb8bitWeight(_Int8, CodedWeight):
    """Linear8bitLt: int8 rows with a float32 scale each, W = CB * SCB / 127, which the kernels read in place.

    Products are of x as it comes with W, where bitsandbytes' own forward may round x to int8 or to float16 first: its
    threshold for outliers has no meaning here.
    """

    names = ("weight", "bias")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return super().accepts(module) and module.weight.dtype is torch.int8

    @property
    def parameters(self) -> Any:
        return self.module._parameters

    @property
    def _scales(self) -> Any:
        # the layer's own forward takes them over from the weight
        return self.module.state.SCB if self.module.state.SCB is not None else self.module.weight.SCB

    def lying(self) -> list[Tensor]:
        return [self.module.weight, self._scales]

    def quant(self) -> QuantWeight:
        # a graph makes the view anew in each call (of scales, a float a row), as it cannot ask whether bytes changed
        return self.view() if torch.compiler.is_compiling() else super().quant()

    def view(self) -> QuantWeight:
        return from_bnb_int8(self.module.weight.data, self._scales)

    def store(self, w: Tensor) -> None:
        bnb: Any = importlib.import_module("bitsandbytes")
        self._put(bnb.nn.Int8Params(w.to("cpu"), requires_grad=False, has_fp16_weights=False))

    def _put(self, weight: Any) -> None:
        """Install an int8 weight; the layer's own state takes its scales over on its next forward."""
        self.module._parameters["weight"] = weight.to(self.module.weight.device)
        state = self.module.state
        state.CB, state.SCB = None, None
        state.reset_grads()

    def save(self) -> Saved:
        return {**BaseWeight.save(self), "SCB": self._scales}

    def restore(self, saved: Saved) -> None:
        put_back(self.module, {name: saved[name] for name in ("weight", "bias")})
        weight = saved["weight"]
        weight.CB, weight.SCB = weight.data, saved["SCB"]
        self._put(weight)


class Bnb8bitFloatWeight(_Int8):
    """Linear8bitLt with `has_fp16_weights`, which quantises its float weight in each forward of its own."""

    def check(self) -> None:
        if not self.module.state.has_fp16_weights:
            raise ValueError("a bitsandbytes Linear8bitLt that is not quantised: move the model to its device first")
