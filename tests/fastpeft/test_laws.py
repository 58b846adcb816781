"""The law: forward(x) is the base layer with the merged weight. Over every registered method and every kind of layer.

Five small methods stand beside the registered ones, so that composition is tested for every way in which a method can
act: adding to the weight, scaling the output, changing the input, reading the weight that it changes, and what no
weight can do.
"""

from __future__ import annotations

import itertools
import random
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.config.base import TargetConfig
from fastpeft.config.types import PeftType
from fastpeft.layer.compose import Composed
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.lora.variants.alora import Alora
from fastpeft.methods.method import Method
from fastpeft.methods.registry import registry
from fastpeft.testing import SAMPLE_BASES, add_adapter, assert_law, make_layer
from torch import nn

from peft_kernels.testing import assert_no_worse

LINEAR = ("linear", "linear-no-bias", "transformers-conv1d", "nf4")


class _Toy(Method):
    peft_type = PeftType.IA3
    prefix = "toy_"
    config_class = TargetConfig


class ScaleOutput(_Toy):
    """y -> l * y, as IA3 does."""

    tensors = ("toy_scale",)
    kinds = frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"})

    def make_state(self, config: Any, info: Any, shared: Any) -> Any:
        self.channel_dim = -1 if info.kind in ("linear", "embedding") else 1
        return {"toy_scale": nn.Parameter(torch.ones(info.out_features))}

    def merged(self, s: Any, shared: Any, w: Any, b: Any) -> Any:
        scale = s.toy_scale.to(w.dtype)
        return w * scale.view(-1, *[1] * (w.dim() - 1)), None if b is None else b * scale

    def output(self, s: Any, shared: Any, x: Any, y: Any, inner: Any) -> Any:
        if inner.info.kind in ("linear", "embedding"):
            return y * s.toy_scale
        return y * s.toy_scale.view(-1, *[1] * (y.dim() - 2))


class RotateInput(_Toy):
    """x -> R x, as OFT does."""

    tensors = ("toy_rotation",)

    def make_state(self, config: Any, info: Any, shared: Any) -> Any:
        return {"toy_rotation": nn.Linear(info.in_features, info.in_features, bias=False)}

    def merged(self, s: Any, shared: Any, w: Any, b: Any) -> Any:
        return w @ s.toy_rotation.weight.to(w.dtype), b

    def input(self, s: Any, shared: Any, x: Any) -> Any:
        return s.toy_rotation(x.to(s.toy_rotation.weight.dtype))


class HadamardOfWeight(_Toy):
    """W -> W + W * B A, as HiRA does: it reads the weight that earlier adapters made."""

    tensors = ("toy_a", "toy_b")
    needs_base_weight = True
    kinds = frozenset({"linear", "conv2d"})

    def make_state(self, config: Any, info: Any, shared: Any) -> Any:
        columns = info.shape[1] * torch.Size(info.shape[2:]).numel()
        return {"toy_a": nn.Parameter(torch.zeros(2, columns)), "toy_b": nn.Parameter(torch.ones(info.out_features, 2))}

    def delta_weight(self, s: Any, shared: Any, w: Any) -> Any:
        return w * (s.toy_b @ s.toy_a).to(w.dtype).view_as(w)


class NewBias(_Toy):
    """b -> b + d through the shared tensors that all layers of an adapter have, as VeRA's A and B are."""

    tensors = ("toy_gain",)

    def make_shared(self, config: Any, layers: Any) -> Any:
        return {"toy_direction": torch.randn(layers[0].out_features, 1, dtype=torch.float64)}

    def make_state(self, config: Any, info: Any, shared: Any) -> Any:
        return {"toy_gain": nn.Parameter(torch.zeros(1, info.in_features))}

    def delta_weight(self, s: Any, shared: Any, w: Any) -> Any:
        return shared.toy_direction.to(s.toy_gain.dtype) @ s.toy_gain


class Kink(_Toy):
    """y -> y + relu(A x), which no weight does, as PEANuT."""

    tensors = ("toy_kink",)
    mergeable = False

    def make_state(self, config: Any, info: Any, shared: Any) -> Any:
        return {"toy_kink": nn.Linear(info.in_features, info.out_features)}

    def output(self, s: Any, shared: Any, x: Any, y: Any, inner: Any) -> Any:
        return y + torch.relu(s.toy_kink(x.to(s.toy_kink.weight.dtype)))


TOYS = [ScaleOutput(), RotateInput(), HadamardOfWeight(), NewBias(), Kink()]
tools = runpy.run_path(str(Path(__file__).with_name("kind_tools.py")))
Kind = tools["Kind"]
EXAMPLES = tools["examples"](TOYS)
KINDS = tools["kinds"](TOYS)


class ByHand:
    """A layer with adapters, done one after another: `method.Inner` with a call that is nothing but `forward`."""

    def __init__(self, layer: AdapterLayer, names: Sequence[str]) -> None:
        self.layer, self.names = layer, list(names)
        self.composed = Composed(layer, names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.composed, name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if not self.names:
            return layer.base.call(x)
        view = layer.view(self.names[-1])
        inner: Any = ByHand(layer, self.names[:-1])
        return layer.methods[self.names[-1]].forward(view, view, x, inner)


def assert_composition(layer: AdapterLayer, names: Sequence[str], x: torch.Tensor) -> None:
    """The rest of the law where an adapter has no merged form: the layer is its adapters, one after another.

    An adapter that computes with the dense weight cannot come after it, and says so.
    """
    layer.double()
    layer.eval()
    layer.set_adapter(list(names))
    aloras = [name for name in names if isinstance(layer.methods[name], Alora)]
    layer.set_row_values({name: [(2, None)] * len(x) for name in aloras})  # they act on the last two tokens
    x = x.double() if x.is_floating_point() else x
    results = [_result(function, x) for function in (layer, ByHand(layer, names))]
    refused = [r for r in results if isinstance(r, ValueError)]
    if refused:
        assert all("in it is needed, but" in str(error) for error in refused)
        assert not set(names[:-1]).isdisjoint(_unmergeable(layer))
        assert not {type(layer.methods[name]).__name__ for name in names[1:]} <= WITHOUT_WEIGHT
        return
    ours, by_hand = results
    assert_no_worse(ours.float(), by_hand.float(), by_hand, by_hand.abs() + 1)
    assert not torch.equal(ours, layer.base_layer(x)), "the adapter does nothing"
    before = {key: value.clone() for key, value in layer.base_layer.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.merge()
    assert layer.merged_adapters == []
    for key, value in layer.base_layer.state_dict().items():
        assert torch.equal(value, before[key])


# Methods that surely go on top of what has no weight, so that not every method can say that it needs one.
WITHOUT_WEIGHT = {"Lora", "IA3", "Vera", "LoHa", "LoKr", "OFT", "Beft", "Lily", "Kink"}


def _result(function: Any, x: torch.Tensor) -> torch.Tensor | ValueError:
    torch.manual_seed(3)  # for a method that samples
    try:
        with torch.no_grad():
            return function(x)
    except ValueError as error:
        return error


def assert_either(layer: AdapterLayer, names: Sequence[str], base: str) -> None:
    """The law or, where one of these adapters has no merged form here, what is left of it."""
    unmergeable = not _unmergeable(layer).isdisjoint(names)
    (assert_composition if unmergeable else assert_law)(layer, names, SAMPLE_BASES[base].input())


def _unmergeable(layer: AdapterLayer) -> set[str]:
    return {name for name, m in layer.methods.items() if m.mergeable_in(layer.view(name), layer.info)}


@pytest.mark.parametrize(
    ("kind", "base"), [(kind, base) for kind in EXAMPLES for base in SAMPLE_BASES if kind.adapts(base)], ids=str
)
def test_one_adapter(kind: Kind, base: str) -> None:
    layer = make_layer(base)
    add_adapter(layer, "a", kind.method, kind.config())
    assert_either(layer, ["a"], base)


GRADIENTS = [(k, b) for k in EXAMPLES for b in ("linear", "nf4", "embedding", "conv2d") if k.adapts(b) and k.merges(b)]


@pytest.mark.parametrize(("kind", "base"), GRADIENTS, ids=str)
def test_gradients_are_those_through_the_merged_weight(kind: Kind, base: str) -> None:
    layer = make_layer(base)
    layer.base_layer.requires_grad_(False)
    add_adapter(layer, "a", kind.method, kind.config())
    layer.double().eval()
    layer.set_adapter("a")
    x = SAMPLE_BASES[base].input()
    # No padding: its row of the table gets no gradient, which is the table's business.
    x = x.double().requires_grad_() if x.is_floating_point() else x.where(x != 3, 4)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    wanted = [*trained.values(), *([x] if x.is_floating_point() else [])]
    y = layer(x)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    with torch.no_grad():
        w0, b0 = (None if t is None else t.double() for t in layer.base.read())
    y = layer.base.apply(x, *layer.merged_weight(["a"], (w0, b0)))
    exact = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    for mine, true in zip(ours, exact, strict=True):
        assert (mine is None) == (true is None)  # what acts in training alone, or has no entries
        if true is not None and true.numel():
            assert_no_worse(mine.float(), true.float(), true, true.abs().max().expand_as(true))


@pytest.mark.parametrize("base", [*LINEAR, "embedding", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_of_the_same_kind(kind: Kind, base: str) -> None:
    if not kind.adapts(base):
        with pytest.raises(ValueError, match=re.escape(make_layer(base).info.name)):
            kind.variant.check_layer(kind.config(), make_layer(base).info)
        return
    layer = make_layer(base)
    for name in ("a", "b"):
        add_adapter(layer, name, kind.method, kind.config())
    if type(kind.variant).check_together is not Method.check_together:
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            layer.set_adapter(["a", "b"])  # the same rows
        return
    for names in (["a", "b"], ["b", "a"]):
        assert_either(layer, names, base)


def together(kinds: Sequence[Kind], base: str) -> tuple[AdapterLayer, dict[str, Kind]]:
    """One layer with an adapter of each kind that can be there."""
    layer = make_layer(base)
    found = {repr(kind): kind for kind in kinds if kind.adapts(base)}
    for name, kind in found.items():
        add_adapter(layer, name, kind.method, kind.config())
    return layer, found


@pytest.mark.parametrize("base", ["linear", "nf4"])
@pytest.mark.parametrize("first", KINDS, ids=str)
def test_any_ordered_pair_of_kinds(first: Kind, base: str) -> None:
    """Both orders on a plain layer, on a quantised one only one of them: there are thousands."""
    if not first.adapts(base):
        pytest.skip(f"not on {base}")
    index = KINDS.index(first)
    others = [
        k for i, k in enumerate(KINDS) if k is not first and (base == "linear" or (i < index) == ((i + index) % 2))
    ]
    layer, kinds = together([first, *others], base)
    failures = []
    for second in list(kinds)[1:]:
        try:
            assert_either(layer, [repr(first), second], base)
        except Exception as error:
            failures.append(f"{first} then {second}: {type(error).__name__} {str(error)[:300]}")
            layer, kinds = together([first, *others], base)
    assert not failures, "\n".join(failures)


TRIPLES = random.Random(0).sample(list(itertools.permutations([k for k in KINDS if k.adapts("linear")], 3)), 40)


@pytest.mark.parametrize("triple", TRIPLES, ids=lambda triple: "-".join(map(str, triple)))
def test_some_triples_of_kinds(triple: Sequence[Kind]) -> None:
    layer, kinds = together(triple, "linear")
    assert_either(layer, list(kinds), "linear")


def test_three_kinds_and_their_order_matters() -> None:
    layer = make_layer("linear")
    for name, method in zip("abc", (registry()[PeftType.LORA], TOYS[1], TOYS[0]), strict=True):
        add_adapter(layer, name, method, method.config_class(**method.examples[0]))
    x = SAMPLE_BASES["linear"].input()
    outputs = []
    for order in itertools.permutations("abc"):
        assert_law(layer, order, x)
        layer.set_adapter(list(order))
        outputs.append(layer(x.double()).detach())
    # LoRA before a rotation differs from LoRA after it: a composition that ignored the order would pass the law for
    # one order only.
    assert not all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_a_method_without_a_merged_form_is_refused_by_name() -> None:
    class Unmergeable(RotateInput):
        mergeable = False

    layer = make_layer("linear")
    add_adapter(layer, "a", Unmergeable(), TargetConfig())
    layer.set_adapter("a")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"'a' cannot be merged into linear: IA3 has no merged form"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_a_grouped_convolution_computes_what_peft_computes_and_refuses_to_merge() -> None:
    import peft

    method = registry()[PeftType.LORA]
    layer = make_layer("conv2d-groups")
    config = method.config_class(r=4)
    add_adapter(layer, "a", method, config)
    layer.set_adapter("a")
    holder = nn.Sequential()
    holder.add_module("conv", layer.base_layer)
    theirs = peft.get_peft_model(holder, peft.LoraConfig(r=4, target_modules=["conv"]), "a")
    theirs.conv.lora_A["a"].load_state_dict(layer.lora_A["a"].state_dict())
    theirs.conv.lora_B["a"].load_state_dict(layer.lora_B["a"].state_dict())
    x = SAMPLE_BASES["conv2d-groups"].input()
    assert torch.equal(layer(x), theirs(x))
    with pytest.raises(ValueError, match="connects the groups"):
        layer.merge()
    with pytest.raises(ValueError, match="divisible by groups"):
        method.check_layer(method.config_class(r=3), layer.info)
