"""Tools of the tests of an adapter's life: a tiny model, and a case for every method and variant."""

from __future__ import annotations

import copy
import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import torch
from fastpeft.config.types import PeftType
from fastpeft.layer.layer import AdapterLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("kind_tools.py")))
IDS = torch.arange(24).view(4, 6) % 31


class Tiny(nn.Module):
    """Layers of the sizes of the sample bases. Names begin with their kind: some configurations choose by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        self.linear = nn.Linear(24, 20)
        self.linear_back = nn.Linear(20, 24)
        self.norm = nn.LayerNorm(24)
        self.checkpointing = False
        self.config = PretrainedConfig()

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        h = self.embedding(input_ids)
        if self.checkpointing and self.training:
            return checkpoint(self.block, h, use_reentrant=False)
        return self.block(h)

    def block(self, h: Tensor) -> Tensor:
        return self.norm(h + self.linear_back(torch.tanh(self.linear(h))))


def tiny(dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(0)
    return Tiny().to(dtype).eval()


# Where a kind can go, the first that it can; the rest of the test cases are embeddings.
PLACES = {"linear": ["linear", "linear_back"], "embedding": ["embedding"], "norm": ["norm"]}


@functools.cache
def accepts(kind: Any, place: str) -> bool:
    try:
        fastpeft.get_peft_model(tiny(), kind.config(target_modules=PLACES[place]))
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Case:
    kind: Any
    place: str

    def __repr__(self) -> str:
        return f"{self.kind}-{self.place}"

    def config(self, **more: Any) -> Any:
        return self.kind.config(target_modules=PLACES[self.place], **more)

    def model(self, seed: int = 1, name: str = "default", dtype: torch.dtype = torch.float32) -> Any:
        """A model with one adapter that does something."""
        model = fastpeft.get_peft_model(tiny(dtype), self.config(), name)
        return scatter(model, name, seed).eval()

    @property
    def merges(self) -> bool:
        layer = layers_of(self.model())[0]
        return layer.methods["default"].mergeable_in(layer.view("default"), layer.info) is None


def scatter(model: nn.Module, name: str, seed: int) -> Any:
    """Other values for an adapter's parameters."""
    torch.manual_seed(seed)
    own = {key: p for key, p in model.named_parameters() if name in key.split(".") and p.is_floating_point()}
    found = [p for key, p in own.items() if ".ranknum." not in key]  # AdaLoRA's count of ranks, which no file holds
    assert found
    with torch.no_grad():
        for parameter in found:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def layers_of(model: nn.Module) -> list[AdapterLayer]:
    return [m for m in model.modules() if isinstance(m, AdapterLayer)]


KINDS = tools["kinds"]()
CASES = [Case(k, p) for k in KINDS for p in PLACES if accepts(k, p) and (p != "norm" or not accepts(k, "linear"))]
# On linear layers, or where it goes if it does not go there.
MAIN = list({id(case.kind): case for case in reversed(CASES)}.values())[::-1]
# Every example of every method, where it goes.
EXAMPLES = [Case(k, p) for k in tools["examples"]() for p in PLACES if accepts(k, p)]
EXAMPLES = [case for case in EXAMPLES if case.place == "linear" or not accepts(case.kind, "linear")]
LORA = Case(next(k for k in KINDS if k.method.peft_type == PeftType.LORA), "linear")


def run(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert_same_bits(after[key], value)


def assert_matches(a: Tensor, b: Tensor, exact: Tensor) -> None:
    """Both are as near to the exact result as float32 allows: neither errs more than the other by more than that."""
    size = exact.abs().max().expand(exact.shape)
    for one, other in ((a, b), (b, a)):
        worst = (other.double() - exact).abs().max()
        assert_no_worse(one, (exact + worst).to(one.dtype), exact, size)


def exactly(model: Any) -> Tensor:
    return run(copy.deepcopy(model).double())


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()


def train(model: Any, steps: int = 3) -> None:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(IDS)).backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in parameters)
        optimizer.step()
    model.eval()
