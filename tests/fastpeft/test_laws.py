"""The law: forward(x) is the base layer with the merged weight. Over every registered method and every kind of layer.

Four small methods stand beside the registered ones, so that composition is tested for every way in which a method can
act: adding to the weight, scaling the output, changing the input, and reading the weight that it changes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fastpeft.config import PeftType, TargetConfig
from fastpeft.method import Method, registry
from fastpeft.testing import SAMPLE_BASES, add_adapter, assert_law, make_layer
from torch import nn

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
        return s.toy_rotation(x)


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


TOYS = [ScaleOutput(), RotateInput(), HadamardOfWeight(), NewBias()]
METHODS = [*registry().values(), *TOYS]

def name_of(method: Method) -> str:
    return type(method).__name__


def configs(method: Method) -> list[Any]:
    return [method.config_class(**values) for values in method.examples]


def serves(method: Method, config: Any, base: str) -> bool:
    method = method.variant(config)
    layer = make_layer(base)
    try:
        method.check_layer(config, layer.info)
    except ValueError:
        return False
    layer.add("probe", method, method.make_state(config, layer.info, _shared(method, config, layer)))
    return method.mergeable_in(layer.view("probe"), layer.info) is None


def _shared(method: Method, config: Any, layer: Any) -> Any:
    values = method.make_shared(config, [layer.info])
    return type("Shared", (), values)() if values else None


CASES = [
    pytest.param(method, config, base, id=f"{name_of(method)}-{i}-{base}")
    for method in METHODS
    for i, config in enumerate(configs(method))
    for base in SAMPLE_BASES
    if serves(method, config, base)
]


@pytest.mark.parametrize(("method", "config", "base"), CASES)
def test_one_adapter(method: Method, config: Any, base: str) -> None:
    layer = make_layer(base)
    add_adapter(layer, "a", method, config)
    assert_law(layer, ["a"], SAMPLE_BASES[base].input())


@pytest.mark.parametrize("base", [*LINEAR, "embedding", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_two_of_the_same_kind(method: Method, base: str) -> None:
    config = configs(method)[0]
    if not serves(method, config, base):
        with pytest.raises(ValueError, match="cannot adapt"):
            method.check_layer(config, make_layer(base).info)
        return
    layer = make_layer(base)
    for name in ("a", "b"):
        add_adapter(layer, name, method, config)
    x = SAMPLE_BASES[base].input()
    assert_law(layer, ["a", "b"], x)
    assert_law(layer, ["b", "a"], x)


@pytest.mark.parametrize("base", LINEAR)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(METHODS, 2)), ids=name_of)
def test_any_ordered_pair_of_kinds(first: Method, second: Method, base: str) -> None:
    layer = make_layer(base)
    add_adapter(layer, "a", first, configs(first)[0])
    add_adapter(layer, "b", second, configs(second)[0])
    assert_law(layer, ["a", "b"], SAMPLE_BASES[base].input())


def test_three_kinds_and_their_order_matters() -> None:
    layer = make_layer("linear")
    for name, method in zip("abc", (registry()[PeftType.LORA], TOYS[1], TOYS[0]), strict=True):
        add_adapter(layer, name, method, configs(method)[0])
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
