"""The weight that is made a few rows at a time, and never kept (made_weight.py)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.math import made_weight as weight_side_module
from fastpeft.methods.math.made_weight import weight_side
from fastpeft.methods.registry import get_method
from fastpeft.testing import add_adapter
from torch import Tensor, nn

assert_near = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))["assert_near"]
BNB = [("HIRA", {"r": 3}), ("GLORA", {}), ("MISS", {"r": 4, "init_weights": "bat"})]


def test_weight_side_is_right_in_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_side_module, "TILE_ELEMENTS", 21)  # rows 3 by 3, the last tile shorter
    shapes = ((2, 3, 7), (10, 2), (2, 7), (10,))
    x, a, b, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)

    def call(*args: Tensor) -> Tensor:
        x, a, b, bias = args
        return weight_side(x, 10, lambda: None, lambda _, i, j, a, b: torch.tanh(a[i:j] @ b), a, b, bias=bias)

    assert_near(call(x, a, b, bias), x @ torch.tanh(a @ b).t() + bias)
    assert torch.autograd.gradcheck(call, (x, a, b, bias))
    frozen = call(x, a.detach(), b, bias).sum()
    assert torch.autograd.grad(frozen, b)[0].shape == b.shape
    expected = torch.autograd.grad(call(x, a, b, bias).square().sum(), (x, a, b, bias))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x, a, b, bias).square().sum(), (x, a, b, bias))
    for one, other in zip(got, expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.parametrize(("name", "options"), BNB)
def test_weights_of_bitsandbytes_are_decoded_when_needed(kind: str, name: str, options: dict[str, Any]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    own = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"compute_dtype": torch.float32}
    module = getattr(bnb.nn, kind)(64, 64, **own)
    module.load_state_dict(nn.Linear(64, 64).state_dict())
    layer, method = AdapterLayer(module.to("cpu").requires_grad_(False), "layer"), get_method(name)
    add_adapter(layer, "a", method, method.config_class(**options))
    layer.set_adapter("a")
    x, kept = torch.randn(3, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: (kept.append(v.shape), v)[1], lambda v: v):
        y = layer(x)
    w, b = layer.merged_weight(["a"])
    assert_near(y, nn.functional.linear(x, w, b), growth=8)
    assert (64, 64) not in kept
    y.sum().backward()
    assert_near(x.grad, w.sum(0).expand(3, -1), growth=8)
