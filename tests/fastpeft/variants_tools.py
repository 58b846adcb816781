"""Tools of the tests of LoRA's variants: a net with every kind of layer, and a pair of models, ours and PEFT's."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import peft
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from peft_kernels.testing import assert_no_worse

close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]
IDS = torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Every kind of layer, in a row. With labels it gives a loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        torch.manual_seed(0)
        self.emb = nn.Embedding(31, 24)
        self.up = nn.Linear(24, 20)
        self.gpt = Conv1D(24, 20)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 31, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
        h = self.gpt(torch.tanh(self.up(self.emb(input_ids))))
        logits = self.head(self.conv(h.transpose(1, 2)).transpose(1, 2))
        if labels is None:
            return logits
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""


def scatter(model: nn.Module, scale: float = 0.3) -> None:
    """Move every trained number, by names, so that both packages' models get the same ones."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * scale)


def pair(options: Callable[[Any], dict[str, Any]], config: str = "LoraConfig") -> tuple[Any, Any]:
    """The same adapter here and in PEFT, its numbers moved from where they began. options: given a package."""
    models = []
    for package in (fastpeft, peft):
        torch.manual_seed(5)
        model = package.get_peft_model(Net(), getattr(package, config)(**options(package)))
        scatter(model)
        models.append(model)
    return models[0], models[1]


def run(model: nn.Module, train: bool, **kwargs: Any) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that weighs every output differently."""
    model.train(train)
    model.zero_grad()
    torch.manual_seed(9)
    y = model(IDS, **kwargs)
    (y * torch.arange(y.numel()).view_as(y).to(y.dtype).sin()).sum().backward()
    return {"output": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_as_peft(ours: Any, theirs: Any, train: bool, **kwargs: Any) -> None:
    a, b = run(ours, train, **kwargs), run(theirs, train, **kwargs)
    exact = run(copy.deepcopy(theirs).double(), train, **kwargs) if not train else b
    assert a.keys() == b.keys()
    for name, value in a.items():
        largest = exact[name].double().abs().max().expand(value.shape)
        worst = (b[name].double() - exact[name]).abs().max()
        assert_no_worse(value, (exact[name] + worst).to(value.dtype), exact[name].double(), 8 * largest)
