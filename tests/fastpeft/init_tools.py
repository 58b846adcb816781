"""Tools of the tests of initialisations: a small model, adapters of it here and in PEFT, and comparisons."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from fastpeft.weights.nf4_linear import NF4Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels import quantize_4bit
from peft_kernels.testing import assert_no_worse, assert_same_bits

X = torch.linspace(-1, 1, 9 * 24).view(9, 24)


class Model(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(24, 20)
        self.second = Conv1D(16, 20) if transposed else nn.Linear(20, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def model(transposed: bool = False) -> Model:
    torch.manual_seed(0)
    made = Model(transposed)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def wrap(library: Any, base: nn.Module, name: str = "default", **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["first", "second"], **options}
    if "kasa_config" in options:
        options["kasa_config"] = library.KasaConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, library.LoraConfig(**options), name)


def train(adapted: Any, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(X.to(next(adapted.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert_same_bits(a[key], b[key])


def assert_matches(a: Tensor, b: Tensor, exact: Tensor) -> None:
    """Both are results of float32, none of them exact."""
    assert_no_worse(a, b, exact.double(), 8 * (exact.abs() + exact.abs().mean()).double())


def bnb(kind: str) -> nn.Module:
    import bitsandbytes

    base = model()
    made = (
        bitsandbytes.nn.Linear4bit(24, 20, quant_type="nf4", compute_dtype=torch.float32)
        if kind == "4bit" else bitsandbytes.nn.Linear8bitLt(24, 20, has_fp16_weights=False)
    )  # fmt: skip
    made.load_state_dict(base.first.state_dict())
    base.first = made.to("cpu")
    return base


def nf4() -> nn.Module:
    base = model()
    base.first = NF4Linear(quantize_4bit(base.first.weight.detach(), nested=True), base.first.bias)
    return base


def assert_near(a: Tensor, b: Tensor, growth: float = 1.0) -> None:
    """Two ways of computing the same in float32 differ by rounding, which what they go through lets grow.

    growth: by how much: a condition number, or the size of terms that cancel over that of the result.
    """
    a, b = a.detach().float(), b.detach().float()
    assert_no_worse(a, b, b.double(), growth * b.abs().max().expand(b.shape).double())
