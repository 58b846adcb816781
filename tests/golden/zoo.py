"""The small model and the adapter configurations behind the golden files.

Shared by `make_golden.py`, which needs peft and bitsandbytes, and by the tests, which need neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
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


# What the golden folder of each name was made with. Every value is also in its adapter_config.json.
CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["up", "down"], "r": 4, "lora_alpha": 8},
    "regex": {"target_modules": r".*\.1\.(up|proj)", "r": 3, "fan_in_fan_out": False},
    "all_linear_names": {"target_modules": ["up", "down", "proj", "head"], "r": 2, "exclude_modules": ["layers.0.up"]},
    "layers_to_transform": {"target_modules": ["up"], "r": 2, "layers_to_transform": [1]},
    "conv1d_gpt2": {"target_modules": ["proj"], "r": 4, "fan_in_fan_out": True},
    "embedding": {"target_modules": ["emb"], "r": 4, "lora_alpha": 12},
    "convs": {"target_modules": ["conv1", "conv2", "conv3"], "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": ["up"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ["up", "down"], "r": 4, "lora_alpha": 8,
        "rank_pattern": {"layers.0.up": 2, r"layers\.1\..*": 6}, "alpha_pattern": {"down": 3},
    },
    "rslora_patterns": {
        "target_modules": ["up", "down"], "r": 4, "lora_alpha": 8, "use_rslora": True,
        "rank_pattern": {"up": 5}, "alpha_pattern": {"layers.1.down": 7},
    },
    "bias_all": {"target_modules": ["up", "down"], "r": 2, "bias": "all"},
    "bias_lora_only": {"target_modules": ["up", "down"], "r": 2, "bias": "lora_only"},
    "lora_bias": {"target_modules": ["up", "proj"], "r": 2, "lora_bias": True},
    "modules_to_save": {"target_modules": ["up"], "r": 2, "modules_to_save": ["head", "norm"]},
    "everything": {
        "target_modules": ["up", "down", "proj", "emb", "conv1", "conv2", "conv3"], "r": 3, "lora_alpha": 4,
        "use_rslora": True, "rank_pattern": {"emb": 2, "conv2": 4}, "modules_to_save": ["head"],
    },
}  # fmt: skip


def base_model(dtype: torch.dtype = torch.float32) -> Zoo:
    model = Zoo()
    model.load_state_dict(load_file(HERE / "base.safetensors"))
    return model.to(dtype).eval()


def inputs() -> Tensor:
    return load_file(HERE / "inputs.safetensors")["ids"]


def loss_of(output: Tensor) -> Tensor:
    """A loss whose gradient differs in every element of the output."""
    weights = torch.arange(1, output.numel() + 1, dtype=output.dtype).reshape(output.shape) / output.numel()
    return (output * weights).sum() + (output**2).mean()
