"""Test helpers, public for methods that others write: sample base layers, and the law that every method obeys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse

from .layer.layer import AdapterLayer
from .layer.shared_tensors import fill_containers, held_containers
from .methods.computed import compute
from .methods.method import Method


@dataclass(frozen=True)
class SampleBase:
    """A base layer in small, and an input for it."""

    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]


def _nf4() -> nn.Module:
    from peft_kernels import quantize_4bit

    from .weights.nf4_linear import NF4Linear

    linear = nn.Linear(24, 20)
    return NF4Linear(quantize_4bit(linear.weight.detach(), nested=True), linear.bias)


def _conv1d() -> nn.Module:
    import transformers.pytorch_utils as transformers_layers

    module: Any = transformers_layers.Conv1D(20, 24)  # type: ignore[no-untyped-call]
    nn.init.normal_(module.bias)
    return module  # type: ignore[no-any-return]


_rows = functools.partial(torch.randn, 2, 5, 24)
# Sizes are multiples of nothing; inputs have a batch dimension first.
SAMPLE_BASES: dict[str, SampleBase] = {
    "linear": SampleBase(lambda: nn.Linear(24, 20), _rows),
    "linear-no-bias": SampleBase(lambda: nn.Linear(24, 20, bias=False), _rows),
    "transformers-conv1d": SampleBase(_conv1d, _rows),
    "nf4": SampleBase(_nf4, _rows),
    "embedding": SampleBase(  # every id of the table, and one again
        lambda: nn.Embedding(31, 20, padding_idx=3),
        lambda: torch.cat([torch.randperm(31), torch.tensor([5])]).view(2, 16),
    ),
    "layernorm": SampleBase(lambda: nn.LayerNorm(24), _rows),
    "rmsnorm": SampleBase(lambda: nn.RMSNorm(24), _rows),
    "conv1d": SampleBase(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 11)),
    "conv2d": SampleBase(lambda: nn.Conv2d(6, 8, (3, 2), dilation=(2, 1)), lambda: torch.randn(2, 6, 9, 7)),
    "conv2d-1x1": SampleBase(lambda: nn.Conv2d(6, 8, 1), lambda: torch.randn(2, 6, 4, 5)),
    "conv2d-circular": SampleBase(
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), lambda: torch.randn(2, 6, 5, 6)
    ),
    "conv2d-groups": SampleBase(lambda: nn.Conv2d(6, 8, 3, groups=2), lambda: torch.randn(2, 6, 5, 6)),
    "conv3d": SampleBase(lambda: nn.Conv3d(4, 6, 2, bias=False), lambda: torch.randn(2, 4, 3, 4, 3)),
}


def add_adapter(layer: AdapterLayer, name: str, method: Method, config: Any) -> None:
    """Add an adapter with random tensors (so that it does something), in the base layer's dtype."""
    info, method = layer.info, method.variant(config)
    method.check_config(config)
    method.check_layer(config, info)
    shared = method.make_shared(config, [info])
    compute(shared)
    state = method.make_state(config, info, SimpleNamespace(**shared))
    compute(state)
    containers = fill_containers(shared, name, held_containers([layer]))
    layer.add(name, method, state, containers)
    tensors = [t for _, _, t in layer.adapter_state(name)]
    tensors += [t for container in containers.values() for _, t in container.tensors(name)]
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * 0.3)


def assert_law(layer: AdapterLayer, names: Sequence[str], x: Tensor) -> None:
    """forward(x) is what the base layer computes with the merged weight, for these adapters in this order.

    Both are computed in float64 and must agree to float32's resolution, so that only a wrong formula can fail. The
    merge is also carried out, and taken back byte for byte. A quantised base is compared with its decoded weight.
    """
    forward = assert_forward_law(layer, names, x)
    assert_merge_and_back(layer, names, x.double() if x.is_floating_point() else x, forward)


def assert_forward_law(layer: AdapterLayer, names: Sequence[str], x: Tensor) -> Tensor:
    """The first half of `assert_law`, which nothing is merged for; returns forward(x), in float64."""
    layer.double()
    if x.is_floating_point():
        x = x.double()
    layer.set_adapter(list(names))
    layer.eval()
    base = layer.base
    with torch.no_grad():
        w0, b0 = (None if t is None else t.double() for t in base.read())
        assert w0 is not None
        forward: Tensor = layer(x)
        w, b = layer.merged_weight(names, (w0, b0))
        exact = base.apply(x, w, b)
        single = x.float() if x.is_floating_point() else x
        eager = base.apply(single, w.float(), None if b is None else b.float())
        positive = x.abs() if x.is_floating_point() else x
        magnitude = base.apply(positive, w0.abs() + (w - w0).abs(), None if b is None else b.abs()).abs()
        assert_no_worse(forward.float(), eager, exact, magnitude)
        assert not torch.equal(exact, base.apply(x, w0, b0)), "the adapter does nothing, so the law says nothing"
        return forward


def assert_merge_and_back(layer: AdapterLayer, names: Sequence[str], x: Tensor, forward: Tensor) -> None:
    """Merging gives a layer that computes the same without adapters, and unmerging gives the old bytes back."""
    before = [t.clone() for t in layer.base_layer.state_dict().values()]
    error = layer.merge(adapter_names=names)
    assert layer.merged_adapters == list(names)
    if layer.base.quantized is None:
        assert error is None
        assert_no_worse(layer(x).float(), forward.float(), forward, forward.abs() + 1)
    else:
        assert error is not None
        assert 0 < error < 0.2
    layer.unmerge()
    after = layer.base_layer.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "unmerge did not restore the bytes"


def make_layer(base: str) -> AdapterLayer:
    """An adapter layer over a sample base, without adapters."""
    return AdapterLayer(SAMPLE_BASES[base].make(), base)
