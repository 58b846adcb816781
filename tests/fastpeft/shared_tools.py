"""Tools of the tests of methods with shared tensors: a small model, their cases, and the same model in PEFT."""

from __future__ import annotations

from typing import Any

import fastpeft
import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.testing import assert_no_worse, assert_same_bits

TARGETS = ["up", "down"]


class Net(nn.Module):
    """Layers of different shapes: the shared tensors have the size of the largest."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 16)
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16, bias=False)
        self.proj = Conv1D(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        h = h + self.down(torch.tanh(self.up(h)))
        return h + self.proj(h)


IDS = torch.arange(10).view(2, 5)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VERA", {"r": 5}),
    "vera-random": ("VERA", {"r": 3, "init_weights": False, "projection_prng_key": 7, "save_projection": False}),
    "vera-gpt2": ("VERA", {"r": 5, "target_modules": ["proj", "up"], "d_initial": 0.7}),
    "pvera": ("PVERA", {"r": 5, "init_weights": False}),
    "pvera-seed": ("PVERA", {"r": 4, "generator_seed": 5, "save_projection": False, "d_initial": 0.3}),
    "randlora": ("RANDLORA", {"r": 5, "init_weights": False, "randlora_alpha": 5}),
    "randlora-sparse": ("RANDLORA", {"r": 4, "sparse": True, "randlora_alpha": 5, "save_projection": False}),
    "randlora-very-sparse": ("RANDLORA", {"r": 30, "very_sparse": True, "init_weights": False, "randlora_alpha": 9}),
    "vblora": ("VBLORA", {"r": 2, "num_vectors": 7, "vector_length": 8}),
    "vblora-topk": ("VBLORA", {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 3,
                               "save_only_topk_weights": True}),
    "unilora": ("UNILORA", {"r": 3, "theta_d_length": 50}),
    "unilora-indices": ("UNILORA", {"r": 2, "theta_d_length": 9, "save_indices": True, "init_weights": False}),
    "tinylora": ("TINYLORA", {"u": 6, "init_weights": "uniform"}),
    "tinylora-tied": ("TINYLORA", {"r": 40, "u": 3, "init_weights": "uniform", "weight_tying": 1.0,
                                   "target_modules": ["emb", "up", "proj"], "save_projection": False}),
    "frod": ("FROD", {"progressbar": False, "sparse_rate": 0.05}),
    "frod-random": ("FROD", {"progressbar": False, "sparse_rate": 0.2, "init_weights": False, "save_projection": False,
                             "target_modules": ["proj", "down"]}),
}  # fmt: skip
BITWISE = {name for name, (kind, _) in CASES.items() if kind != "FROD"}


def configuration(library: Any, case: str, **more: Any) -> Any:
    kind, options = CASES[case]
    return library.get_peft_config({"peft_type": kind, "target_modules": TARGETS, **options, **more})


def model(library: Any, case: str, dtype: torch.dtype = torch.float32, base: Any = None, **more: Any) -> Any:
    torch.manual_seed(0)
    base = (Net() if base is None else base).to(dtype)
    torch.manual_seed(1)
    return library.get_peft_model(base, configuration(library, case, **more))


def pair(case: str, **more: Any) -> tuple[Any, Any]:
    ours, theirs = model(fastpeft, case, **more), model(peft, case, **more)
    return ours, theirs


def spread(*models: Any) -> None:
    """Trained tensors leave their initial values, the same way in each model."""
    for m in models:
        torch.manual_seed(2)
        with torch.no_grad():
            for _, p in sorted(trained(m).items()):
                p.add_(torch.randn_like(p) * 0.1)


def trained(m: Any) -> dict[str, nn.Parameter]:
    return {n: p for n, p in m.named_parameters() if p.requires_grad}


def assert_same(actual: Tensor, expected: Tensor, case: str) -> None:
    """The same bits, but for files that hold softmaxes instead of logits."""
    if case != "vblora-topk":
        assert_same_bits(actual.detach(), expected.detach())
    else:
        exact = expected.detach().double()
        assert_no_worse(actual.detach(), expected.detach(), exact, exact.abs() * 8 + 1)
