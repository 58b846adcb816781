"""Tools of the tests of IA3, BEFT, LN tuning, tokens, SHiRA, SuperTuning, AdaMSS, Lily and PEANuT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_kernels.testing import assert_no_worse


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.proj, self.norm = Conv1D(12, 12), nn.LayerNorm(12)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h + self.proj(self.down(torch.tanh(self.up(h)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(9, 12, padding_idx=2)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(4, 8, 3, groups=2, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        for layer in self.layers:
            h = layer(h)
        return self.conv(h.unflatten(-1, (4, 3, 1)).flatten(0, 1))


IDS = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 2]])


def make(library: Any, name: str, options: dict[str, Any], **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, a bias that is not there
        config = getattr(library, f"{name}Config")(**options)
        net = Net().eval()
        torch.manual_seed(1)
        return library.get_peft_model(net, config, **more).eval()


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def shake(model: Any) -> None:
    """The effect of training: other values, the same here and there."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(trained(model).items()):
            p.add_(torch.randn_like(p) * 0.2)


def check(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert_no_worse(actual, eager, exact, 4 * (exact.abs() + exact.abs().mean()))


def load(library: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.PeftModel.from_pretrained(Net(), folder).eval()


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=tied, num_key_value_heads=1, **small)).eval()
