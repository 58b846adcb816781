"""The output head for few rows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import PreparedCall, lora_linear

from .ways import ways_of

_ROWS = 4  # above this torch's matrix product is the better one
CALL = "_fastpeft_head"  # the attribute of a head that keeps its prepared call


def head_forward(self: Any, input: Tensor) -> Tensor:
    # `hidden[:, -1:]` is not contiguous: torch takes the matrix once a row then, in bfloat16 at 200 times the time
    input = input.contiguous()
    # torch reads a large matrix at half of the memory's speed when it meets one row, and copies it first in bfloat16
    if (
        input.numel() > _ROWS * self.in_features or torch.is_grad_enabled()
        or input.dtype is not self.weight.dtype or not ways_of(input).head
    ):  # fmt: skip
        dense: Tensor = nn.Linear.forward(self, input)
        return dense
    if torch.compiler.is_compiling():  # a graph keeps nothing
        return lora_linear(input, self.weight, bias=self.bias)
    call = self.__dict__.get(CALL)
    if call is None:
        call = self.__dict__[CALL] = PreparedCall(lora_linear)
    one: Tensor = call(input, self.weight, None, None, 1.0, self.bias)
    return one
