"""Initial values as PEFT draws them; on the meta device, where drawing would import torch's compiler, tensors stay as
they are for a file to fill."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def kaiming_(tensor: Tensor) -> Tensor:
    """As torch starts the weight of a linear layer, in place."""
    return tensor if tensor.is_meta else nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return tensor if tensor.is_meta else nn.init.normal_(tensor, mean, std)


def drawn_normal(*shape: int) -> Tensor:
    """`torch.randn`."""
    return normal_(torch.empty(shape))


def drawn_uniform(size: int) -> Tensor:
    """`torch.rand`."""
    values = torch.empty(size)
    return values if values.is_meta else values.uniform_()
