"""Mixed batches: every row is what it is through its own adapter alone, over every method, with gradients."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import IA3Config, LoraConfig
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.lily import Lily
from fastpeft.methods.lora.variants.alora import Alora
from fastpeft.methods.registry import get_method
from fastpeft.testing import SAMPLE_BASES, add_adapter, make_layer
from torch import Tensor

from peft_kernels.testing import assert_no_worse

tools = runpy.run_path(str(Path(__file__).with_name("kind_tools.py")))
Kind, KINDS, EXAMPLES = tools["Kind"], tools["kinds"](), tools["examples"]()
LORA = get_method("LORA")
OFFSETS = [(n, None) for n in (2, 1, 3, None, 2, 4, 1, 2, 3, 1, 5, 2)]  # aLoRA's, a row each


def batch(base: str, rows: int) -> Tensor:
    x = torch.cat([SAMPLE_BASES[base].input() for _ in range(-(-rows // 2))])[:rows]
    return x if x.is_floating_point() else x.masked_fill(x == 3, 4)  # no padding, whose row has no gradient


def mixed_layer(kind: Any, base: str) -> tuple[AdapterLayer, list[str]]:
    """A frozen layer with two adapters of a kind, two LoRAs of other ranks, one with a bias and an IA3; and rows."""
    layer = make_layer(base)
    layer.base_layer.requires_grad_(False)
    for name in ("a", "b"):
        add_adapter(layer, name, kind.method, kind.config())
    others = {"l4": LoraConfig(r=4), "l2": LoraConfig(r=2, lora_alpha=3), "bias": LoraConfig(r=2, lora_bias=True),
              "ia3": IA3Config(feedforward_modules=[], target_modules=["x"])}  # fmt: skip
    for name, config in others.items():
        method = get_method(config.peft_type)
        if layer.info.kind in method.kinds and not (layer.info.kind == "embedding" and name == "bias"):
            add_adapter(layer, name, method, config)
    rows = ["l4", "a", "__base__", "b", "bias", "a", "l2", "l4", "elsewhere", "ia3", "a", "b"]
    return layer.eval(), rows


def offsets(layer: AdapterLayer, members: Iterable[int]) -> dict[str, Any]:
    """For those that ask for values of rows and take any: the aLoRAs."""
    return {n: [OFFSETS[i] for i in members] for n, m in layer.methods.items() if isinstance(m, Alora)}


def one_by_one(layer: AdapterLayer, rows: Sequence[str], x: Tensor) -> Tensor:
    """Each row through its adapter alone; of a method that mixes the rows of a batch (Lily's router takes a mean over
    it), all rows of an adapter at once."""
    parts: dict[int, Tensor] = {}
    for name in dict.fromkeys(rows):
        own = [i for i, row in enumerate(rows) if row == name]
        names = [name] if name in layer.methods else []
        for members in [own] if names and isinstance(layer.methods[name], Lily) else [[i] for i in own]:
            layer.set_row_values(offsets(layer, members))
            layer.set_adapter(names)
            parts.update(zip(members, layer._compose(x[members], names, (), {}), strict=True))
    return torch.stack([parts[i] for i in range(len(rows))])


def together(layer: AdapterLayer, rows: Sequence[str], x: Tensor) -> Tensor:
    layer.set_row_values(offsets(layer, range(len(rows))))
    layer.set_rows(rows)
    try:
        return layer(x)
    finally:
        layer.set_rows(None)
        layer.set_row_values(None)


def assert_rows(layer: AdapterLayer, rows: Sequence[str], x: Tensor) -> None:
    """In float32, no worse than each row alone; in float64, to float32's resolution, so that only a wrong formula can
    fail."""
    wide = copy.deepcopy(layer).double()
    wide_x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        exact = one_by_one(wide, rows, wide_x)
        size = exact.abs().max().expand_as(exact)
        assert_no_worse(together(layer, rows, x), one_by_one(layer, rows, x), exact, size)
        got = together(wide, rows, wide_x)
        assert_no_worse(got.float(), exact.float(), exact, exact.abs() + 1)
        base = one_by_one(wide, ["__base__"] * len(rows), wide_x)
    for i, name in enumerate(rows):
        if name not in layer.methods:
            assert_no_worse(got[i].float(), base[i].float(), base[i], base[i].abs() + 1)


BASES = ("linear", "nf4", "transformers-conv1d", "embedding", "conv2d", "layernorm")
CASES = [(k, b) for k in EXAMPLES for b in BASES if (b == "linear" or k in KINDS) and k.adapts(b)]


@pytest.mark.parametrize(("kind", "base"), CASES, ids=str)
def test_rows_of_a_kind_beside_others(kind: Any, base: str) -> None:
    layer, rows = mixed_layer(kind, base)
    assert_rows(layer, rows, batch(base, len(rows)))


@pytest.mark.parametrize(("kind", "base"), [c for c in CASES if c[0] in KINDS and c[1] in ("linear", "nf4")], ids=str)
def test_gradients_of_a_kind_beside_others(kind: Any, base: str) -> None:
    """Of x and of every adapter: those that the rows have alone, added up."""
    layer, rows = mixed_layer(kind, base)
    layer.set_requires_grad([*layer.methods])
    x = batch(base, len(rows))
    weights = torch.randn(*x.shape[:-1], layer.out_features)
    wide = copy.deepcopy(layer).double()
    found = []
    for each, run in ((layer, together), (layer, one_by_one), (wide, one_by_one), (wide, together)):
        each.set_requires_grad([*each.methods])
        given = x.to(next(each.parameters()).dtype if each is layer else torch.float64).requires_grad_()
        trained = [p for _, p in sorted(each.named_parameters()) if p.requires_grad]
        y = run(each, rows, given)
        loss = (y * weights.to(y.dtype)).sum()
        each.set_requires_grad([*each.methods])
        found.append(torch.autograd.grad(loss, [given, *trained], allow_unused=True))
    for mine, eager, exact, mine64 in zip(*found, strict=True):
        assert (mine is None) == (exact is None)
        if exact is not None and exact.numel():
            size = exact.abs().max().expand_as(exact)
            assert_no_worse(mine, eager, exact, size)
            assert_no_worse(mine64.float(), exact.float(), exact, size)
