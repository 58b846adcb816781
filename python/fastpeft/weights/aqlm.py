"""Layers of AQLM (QuantizedLinear): sums of vectors out of codebooks. The package is not imported."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import acts_in_calls, has_base
from .foreign import DecodedWeight


class AqlmWeight(DecodedWeight):
    """QuantizedLinear. On a CPU the base is a product with the decoded weight, made in each call, since AQLM's own
    kernels there are for codebooks of 256 vectors alone and turn the codes over; elsewhere its forward computes."""

    label, quantized = "AqlmLoraLinear", "aqlm"
    names = ("codes", "bias")
    refusal = "AQLM's codebooks come from a search over data, which cannot be made again here"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return has_base(module, "QuantizedLinear", "aqlm")

    @property
    def dtype(self) -> torch.dtype:
        return self.module.codebooks.dtype  # type: ignore[no-any-return]

    def lying(self) -> list[Tensor]:
        return [self.module.codes, self.module.codebooks, self.module.scales]

    def decoded(self) -> Tensor:
        module = self.module
        codes, books = module.codes.detach(), module.codebooks.detach()
        count, size, out_group, in_group = books.shape
        # its first forward on a CPU exchanges the first two sizes of the codes, for good
        turned = getattr(module, "gemv_op", None) is not None and not codes.is_cuda and size == 256
        if turned or codes.shape[0] != module.out_features // out_group:
            codes = codes.transpose(0, 1)
        rows, columns, _ = codes.shape
        places = codes.to(torch.int64) % size + torch.arange(count, device=codes.device) * size
        vectors = F.embedding_bag(places.reshape(-1, count), books.reshape(count * size, -1).float(), mode="sum")
        blocks = vectors.view(rows, columns, out_group, in_group) * module.scales.detach().float()
        dense: Tensor = blocks.transpose(1, 2).reshape(rows * out_group, columns * in_group)
        return dense

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if args or kwargs or x.is_cuda or acts_in_calls(module):
            return module(x, *args, **kwargs)  # type: ignore[no-any-return]
        w, b = self.read()
        return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
