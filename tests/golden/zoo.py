"""The small models behind the golden files, and the cases (`cases.py`).

Shared by `make_golden.py`, which needs peft and bitsandbytes, and by the tests, which need neither.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.proj = Conv1D(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.down(torch.tanh(self.up(h)))
        return self.norm(h + self.proj(h))


class Zoo(nn.Module):
    """One of every layer that LoRA goes on: ids [batch, 6] -> [batch, 6, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.body = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.conv1 = nn.Conv1d(16, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, padding=1, stride=(1, 2))
        self.conv3 = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))
        self.head = nn.Linear(64, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        for layer in self.body["layers"]:
            h = layer(h)
        h = h + self.conv1(h.transpose(1, 2)).transpose(1, 2)
        h = self.conv2(h[:, None])  # [batch, 4, 6, 8]
        h = self.conv3(h[:, None]).flatten(1, 2)  # [batch, 8, 6, 8]
        return self.head(h.transpose(1, 2).flatten(2))


class Pixels(nn.Module):
    """Convolutions whose numbers of channels have divisors."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 32)
        self.conv2 = nn.Conv2d(8, 12, 2, padding=1, stride=2)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids).unflatten(-1, (8, 4)).transpose(1, 2)  # [batch, 8, 6, 4]
        h = self.pointwise(torch.tanh(self.conv2(h)))  # [batch, 8, 4, 3]
        return self.head(h.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Layers where PEFT looks for those that it can replicate."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.config = PretrainedConfig(num_hidden_layers=2, tie_word_embeddings=False)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        h = self.emb(input_ids)
        for layer in self.layers:
            h = layer(h)
        return h


class Attention(nn.Module):
    """nn.MultiheadAttention, which reads its weights rather than calling modules."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        return self.head(h + self.attn(h, h, h, need_weights=False)[0])


class Expert(nn.Module):
    """Experts as MoE models keep them: parameters with a dimension for the expert, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 12) / 4)
        self.down = nn.Parameter(torch.randn(3, 12, 16) / 4)
        self.flat = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, h: Tensor) -> Tensor:
        weights = torch.softmax(h[..., :3], -1)
        each = torch.einsum("bti,eio->bteo", h, self.up)
        each = torch.einsum("bteo,eoi->btei", torch.tanh(each), self.down)
        return h @ self.flat.T + (each * weights[..., None]).sum(2)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.experts = Expert()
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.experts(self.emb(ids)))


BASES = {"zoo": Zoo, "pixels": Pixels, "decoder": Decoder, "attention": Attention, "experts": Experts}
CASES: dict[str, dict[str, Any]] = runpy.run_path(str(HERE / "cases.py"))["CASES"]


def base_file(base: str) -> Path:
    return HERE / ("base.safetensors" if base == "zoo" else f"base_{base}.safetensors")


def base_model(dtype: torch.dtype = torch.float32, case: str = "linear") -> Any:
    """The base model of a case, in the state in which PEFT adapted it."""
    base = CASES[case].get("base", "zoo")
    model = BASES[base]()
    model.load_state_dict(load_file(base_file(base)))
    return model.to(dtype).eval()


def inputs() -> Tensor:
    return load_file(HERE / "inputs.safetensors")["ids"]


def call(model: nn.Module, case: str) -> Tensor:
    output: Tensor = model(inputs(), **CASES[case].get("call", {}))
    return output


def loss_of(output: Tensor) -> Tensor:
    """A loss whose gradient differs in every element of the output."""
    weights = torch.arange(1, output.numel() + 1, dtype=output.dtype).reshape(output.shape) / output.numel()
    return (output * weights).sum() + (output**2).mean()
