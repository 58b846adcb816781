"""Layers of HQQ (HQQLinear). The package is imported only to write one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.formats import from_hqq

from .base import Saved, has_base
from .foreign import CodedWeight, DecodedWeight, ForeignWeight


class _Hqq(ForeignWeight):
    label, quantized = "HqqLoraLinear", "hqq"
    names = ("W_q", "bias")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return has_base(module, "HQQLinear", "hqq")

    def check(self) -> None:
        if getattr(self.module, "W_q", None) is None or self.module.meta is None:
            raise ValueError("an HQQLinear that is not quantised: call its `initialize` first")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.module.meta["shape"])

    def lying(self) -> list[Tensor]:
        return [self.module.W_q, *(t for t in self.module.meta.values() if isinstance(t, Tensor))]

    def store(self, w: Tensor) -> None:
        module: Any = self.module
        device = module.W_q.device
        module._parameters.pop("W_q", None)  # HQQ assigns a plain tensor first
        module.quantize(w.to(device), **copy.deepcopy(module.quant_config))

    def save(self) -> Saved:
        # `quantize` makes new tensors and a new `meta`, and writes into none that are there
        return {**super().save(), "meta": self.module.meta}


class HqqWeight(_Hqq, CodedWeight):
    """HQQ of 4 and 8 bits in groups along rows: the codes are repacked once, in a copy of them."""

    names = _Hqq.names

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        meta: Any = getattr(module, "meta", None)
        if not super().accepts(module) or not isinstance(meta, dict):
            return False
        group = meta.get("group_size") or meta["shape"][1]
        return (
            meta.get("axis") == 1 and meta.get("nbits") in (4, 8) and meta["shape"][1] % group == 0
            and isinstance(meta.get("scale"), Tensor) and isinstance(meta.get("zero"), Tensor)
        )  # fmt: skip

    def view(self) -> QuantWeight:
        meta = self.module.meta
        # HQQ quantises in inference mode, whose tensors no gradient goes by
        copies = {name: meta[name].clone() for name in ("scale", "zero")}
        return from_hqq(self.module.W_q.detach().clone(), {**meta, **copies})


class HqqDecodedWeight(_Hqq, DecodedWeight):
    """HQQ of other bits, in groups along columns, or with scales that are quantised themselves."""

    names = _Hqq.names

    def decoded(self) -> Tensor:
        w: Tensor = self.module.dequantize()
        return w.to(torch.float32)
