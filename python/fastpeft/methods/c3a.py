"""C3A: W + a matrix of circulant blocks of b, each given by its kernel of b numbers, / in_features (arXiv 2407.19342).

A circulant block is a product of Fourier coefficients: per token the transforms of d numbers and, for each of b / 2
frequencies, a complex product with [in / b, out / b] numbers: 2 d^2 / b multiplications against d^2 of the layer.
The backward keeps x and the kernels and transforms x again. PEFT's forward of two adapters feeds one to the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import HasBias, TargetConfig
from ..weights.base import widened
from .math.draws import normal_
from .math.spectral import SpectrumMethod
from .method import Inner, LayerInfo, Method, State


@dataclass
class C3AConfig(HasBias, TargetConfig, own_type="C3A"):
    """block_size: divides the input and output sizes; block_size_pattern: its value by layer. init_weights: zeros
    (True), "gaussian", "kaiming_uniform" or "xavier_uniform" (also False)."""

    not_in_peft = ("exclude_modules",)
    choices: ClassVar[Any] = {"init_weights": (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")}

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"


class C3A(Method, config=C3AConfig):
    tensors = ("c3a_kernel",)
    default_targets = SpectrumMethod.default_targets
    patterns: ClassVar[dict[str, str]] = {"block_size": "block_size_pattern"}
    divisor_error = (
        "The block size should be a factor of the {side}put size. However, the {side}put size is {whole} and the block "
        "size is {part}"
    )
    divisors: ClassVar[dict[str, tuple[str, ...]]] = {"block_size": ("in_features", "out_features")}
    examples = (
        {"block_size": 4}, {"block_size": 2, "init_weights": "gaussian"}, {"block_size": 1, "init_weights": True},
    )  # fmt: skip

    def make_state(self, config: C3AConfig, info: LayerInfo, shared: Any) -> State:
        b, ins, outs = config.block_size, info.in_features, info.out_features
        kernel = torch.zeros(outs // b, ins // b, b)
        if config.init_weights == "gaussian":
            normal_(kernel)
        elif config.init_weights is not True and not kernel.is_meta:
            xavier = math.sqrt(3.0) * math.sqrt(2.0 / (ins + outs))
            bound = math.sqrt(1 / ins) if config.init_weights == "kaiming_uniform" else xavier
            kernel.uniform_(-bound, bound)
        return {"c3a_kernel": nn.Parameter(kernel), "block_size": b}

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        kernel = widened(s.c3a_kernel)
        outs, ins, b = kernel.shape
        i = torch.arange(b, device=kernel.device)
        blocks = kernel[..., (i[None, :] - i[:, None]) % b]  # [outs, ins, row, column]
        return blocks.transpose(1, 2).reshape(outs * b, ins * b) / (ins * b)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        return y + _Circulant.apply(x, widened(s.c3a_kernel))  # type: ignore[no-any-return, no-untyped-call]


def _spectrum(x: Tensor, blocks: int, dtype: torch.dtype) -> Tensor:
    """[frequencies, tokens, blocks]"""
    found: Tensor = torch.fft.rfft(x.reshape(-1, blocks, x.shape[-1] // blocks).to(dtype))
    return found.permute(2, 0, 1)


class _Circulant(torch.autograd.Function):
    """x times the transposed matrix of circulant blocks, by frequency: Y_f = X_f conj(K_f)^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        outs, ins, b = kernel.shape
        y = _spectrum(x, ins, kernel.dtype) @ torch.fft.rfft(kernel).permute(2, 1, 0).conj()
        signal: Tensor = torch.fft.irfft(y.permute(1, 2, 0), n=b) / (ins * b)
        return signal.reshape(*x.shape[:-1], outs * b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        outs, ins, b = kernel.shape
        dx = dkernel = None
        dy = _spectrum(grads[0], outs, kernel.dtype) / (ins * b)
        if ctx.needs_input_grad[0]:
            products = dy @ torch.fft.rfft(kernel).permute(2, 0, 1)
            dx = torch.fft.irfft(products.permute(1, 2, 0), n=b).reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            products = dy.mH @ _spectrum(x, ins, kernel.dtype)
            dkernel = torch.fft.irfft(products.permute(1, 2, 0), n=b)
        return dx, dkernel
