"""Tools of the tests of methods beside live PEFT: the same layer with the same adapter in both libraries."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import fastpeft
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from peft_kernels.testing import assert_no_worse, assert_same_bits

# By name: a function that makes the layer, and the shape of an input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lin": (lambda: nn.Linear(24, 20), (2, 5, 24)),
    "plain": (lambda: nn.Linear(24, 20, bias=False), (3, 24)),
    "wide": (lambda: nn.Linear(16, 28), (3, 16)),
    "gpt2": (lambda: Conv1D(20, 24), (2, 5, 24)),
    "embedding": (lambda: nn.Embedding(31, 24, padding_idx=3), (2, 7)),
    "conv1": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "conv2": (lambda: nn.Conv2d(6, 8, 3, stride=2, dilation=(2, 1)), (2, 6, 9, 7)),
    "square": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 7)),
    "pixel": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 4, 5)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 6)),
    "conv3": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 3)),
}


def input_of(layer: str) -> Tensor:
    shape = LAYERS[layer][1]
    return torch.randint(0, 31, shape) if layer == "embedding" else torch.randn(shape)


def model_of(library: Any, layer: str | nn.Module, name: str, options: dict[str, Any], seed: int = 1) -> Any:
    """A model of one layer with an adapter: `name` is the configuration's class."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("layer", LAYERS[layer][0]() if isinstance(layer, str) else copy.deepcopy(layer))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        for known in (".*fan_in_fan_out|.*CUDA extension|.*butterfly|.*symmetric|Invalid `", ".*clamped to"):
            warnings.filterwarnings("ignore", message=known)
        return library.get_peft_model(base, getattr(library, name)(target_modules=["layer"], **options)).eval()


def pair(layer: str, name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Ours and PEFT's, made with the same seed."""
    return model_of(fastpeft, layer, name, options), model_of(peft, layer, name, options)


def randomise(*models: Any) -> None:
    """The same random values for what each of them trains."""
    for model in models:
        torch.manual_seed(3)
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.data = torch.randn(parameter.shape) * 0.3


def run(model: Any, x: Tensor) -> list[Tensor]:
    """The output and every gradient, by name."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = model(x)
    torch.manual_seed(4)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    grads = [p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return [y.detach(), *([x.grad] if x.grad is not None else []), *grads]


def cases_of(cases: list[tuple[str, dict[str, Any], str]]) -> list[Any]:
    """(configuration class, options, names of layers) as a test's parameters: one for each layer."""
    return [
        pytest.param(name, options, layer, id=f"{name}-{i}-{layer}")
        for i, (name, options, layers) in enumerate(cases)
        for layer in layers.split()
    ]


def assert_same_start(ours: Any, theirs: Any) -> None:
    """The same seed gives the keys and bits that it gives in PEFT."""
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(state[key], value)


def close(actual: Tensor, expected: Tensor, times: float = 1.0) -> None:
    """Equal to float32's resolution, whatever the dtype. The terms behind an element of a deep model are as large as
    the tensor's largest ones; times: how many such terms one of them is made of."""
    largest = (expected.abs().max() + 1).double().expand(expected.shape)
    assert_no_worse(actual.float(), expected.float(), expected.double(), largest * 4 * times)


def assert_as_good(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """As PEFT in float64, to the accuracy that PEFT's own float32 has anywhere in the tensor."""
    for a, b, c in zip(ours, theirs, exact, strict=True):
        if not c.numel():  # OSF can leave nothing to train
            assert a.shape == b.shape == c.shape
            continue
        worst, largest = (b.double() - c).abs().max(), c.abs().max().clamp(min=1.0).expand(c.shape)
        assert_no_worse(a, (c + worst).to(b.dtype), c, largest)


def assert_equal(ours: Any, wanted: Any) -> None:
    """Tensors, or dicts of them, as equal as sums in another order are."""
    if isinstance(wanted, dict):
        assert ours.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_equal(ours[key], value)
        return
    assert ours.shape == wanted.shape
    assert ours.dtype == wanted.dtype
    if wanted.numel():  # AdaLoRA and OSF can leave nothing
        close(ours, wanted, times=8)


def agree(a: Tensor, b: Tensor) -> bool:
    """True if results are equal to float32's resolution of the largest element; in float64 only a formula differs."""
    return bool(((a - b).abs() <= 4 * torch.finfo(torch.float32).eps * b.abs().max()).all())


def cost_of(model: Any, x: Tensor) -> tuple[int, int]:
    """FLOPs of forward and backward, and bytes kept for the backward beside x and the parameters and buffers."""
    x = x.requires_grad_(True)
    known = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is counted for another at its place

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), FlopCounterMode(display=False) as flops:
        y = model(x)
    with flops:
        y.sum().backward()
    return flops.get_total_flops(), sum(kept.values())
