"""AdapterLayer on its own: when its plan must be made anew, compiling, mixed batches, containers."""

from __future__ import annotations

import copy
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import LoraConfig
from fastpeft.config.base import TargetConfig
from fastpeft.layer.containers import AdapterDict
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.method import Method
from fastpeft.testing import SAMPLE_BASES, add_adapter
from fastpeft.weights.find import weight_of
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("layer_tools.py")))
LORA, lora_layer, composed, size_of, assert_as_composed, QUANTISED = (
    tools[name] for name in ("LORA", "lora_layer", "composed", "size_of", "assert_as_composed", "QUANTISED")
)


# Whatever may happen to a layer after its first forward. Each must be seen by the next forward.
def _replace_parameter(layer: AdapterLayer) -> None:
    layer.lora_A["a"].weight = nn.Parameter(torch.randn_like(layer.lora_A["a"].weight))


def _replace_a(layer: AdapterLayer) -> None:
    layer.lora_A["a"] = nn.Linear(24, 4, bias=False)


def _replace_b(layer: AdapterLayer) -> None:
    layer.lora_B["a"] = nn.Linear(4, 20, bias=False)


def _replace_module_with_another_kind(layer: AdapterLayer) -> None:
    layer.lora_B["a"] = nn.Sequential(nn.Linear(4, 20))


def _write_parameter(layer: AdapterLayer) -> None:
    with torch.no_grad():
        layer.lora_B["a"].weight.mul_(-2)


def _replace_base_weight(layer: AdapterLayer) -> None:
    layer.base_layer.weight = nn.Parameter(torch.randn(20, 24), requires_grad=False)


def _replace_bias(layer: AdapterLayer) -> None:
    layer.base_layer.bias = nn.Parameter(torch.randn(20), requires_grad=False)


def _train_bias(layer: AdapterLayer) -> None:
    layer.base_layer.bias.requires_grad_(True)


def _assign_state(layer: AdapterLayer) -> None:
    state = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _copy_state(layer: AdapterLayer) -> None:
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})


def _assign_adapter_state(layer: AdapterLayer) -> None:
    layer.lora_A["a"].load_state_dict({"weight": torch.randn(4, 24)}, assign=True)


def _new_scaling(layer: AdapterLayer) -> None:
    layer.scaling["a"] = 3.0


def _other_adapter(layer: AdapterLayer) -> None:
    layer.set_adapter("b")


def _both_adapters(layer: AdapterLayer) -> None:
    layer.set_adapter(["b", "a"])


def _no_adapter(layer: AdapterLayer) -> None:
    layer.set_adapter([])


def _disable(layer: AdapterLayer) -> None:
    layer.enable_adapters(False)


def _merge(layer: AdapterLayer) -> None:
    layer.merge()


def _merge_unmerge(layer: AdapterLayer) -> None:
    layer.merge()
    layer(torch.randn(2, 24))
    layer.unmerge()


def _delete(layer: AdapterLayer) -> None:
    layer.delete_adapter("a")


def _replace_adapter(layer: AdapterLayer) -> None:
    add_adapter(layer, "a", LORA, LoraConfig(r=2))


def _double(layer: AdapterLayer) -> None:
    layer.double().float()


def _hook_on_base(layer: AdapterLayer) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def _hook_on_a(layer: AdapterLayer) -> None:
    layer.lora_A["a"].register_forward_hook(lambda module, args, output: output * 2)


def _pre_hook_on_b(layer: AdapterLayer) -> None:
    layer.lora_B["a"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _parametrize(layer: AdapterLayer) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    nn.utils.parametrize.register_parametrization(layer.lora_A["a"], "weight", Twice())


def _other_dropout(layer: AdapterLayer) -> None:
    layer.lora_dropout["a"] = nn.Threshold(0.1, 0.0)


CHANGES: list[Callable[[AdapterLayer], None]] = [
    _replace_parameter, _replace_a, _replace_b, _replace_module_with_another_kind, _write_parameter,
    _replace_base_weight, _replace_bias, _train_bias, _assign_state, _copy_state, _assign_adapter_state,
    _new_scaling, _other_adapter, _both_adapters, _no_adapter, _disable, _merge, _merge_unmerge, _delete,
    _replace_adapter, _double, _hook_on_base, _hook_on_a, _pre_hook_on_b, _parametrize, _other_dropout,
]  # fmt: skip
INVISIBLE = (_train_bias, _double, _merge_unmerge)  # these keep the output as it was


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_a_change_is_seen_by_the_next_forward(change: Callable[[AdapterLayer], None]) -> None:
    layer = lora_layer(names="ab")
    x = torch.randn(3, 24)
    before = layer(x).detach()
    assert layer._plan is not None
    change(layer)
    for _ in range(2):  # the second forward may take another path than the first
        y = assert_as_composed(layer, x)
    assert torch.equal(y, before) == (change in INVISIBLE)


def test_a_bias_that_trains_gets_its_gradient() -> None:
    layer = lora_layer()
    _train_bias(layer)
    layer(torch.randn(3, 24)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((20,), 3.0))


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    layer = lora_layer()
    layer.base_layer.weight.requires_grad_(True)
    x = torch.randn(3, 24)
    layer(x).sum().backward()
    assert_no_worse(layer.weight.grad, x.sum(0).expand(20, 24), x.double().sum(0).expand(20, 24))


def test_copies_have_plans_of_their_own() -> None:
    layer = lora_layer()
    x = torch.randn(3, 24)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._plan is None
        assert_same_bits(twin(x), y)
        with torch.no_grad():
            twin.lora_B["a"].weight.zero_()
        assert not torch.equal(twin(x), y)
        assert_same_bits(layer(x), y)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("base", ["linear", "nf4", "bnb-nf4", "conv2d"])
def test_a_layer_compiles_into_one_graph(base: str, warm: bool, training: bool) -> None:
    layer = lora_layer(QUANTISED[base]() if base in QUANTISED else base, lora_dropout=0.2).train(training)
    x = torch.randn(3, 64) if base in QUANTISED else SAMPLE_BASES[base].input()
    if warm:  # a plan made before must not stand in the way
        layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, layer):
        layer.zero_grad()
        torch.manual_seed(3)
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == 3
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    layer.merge()
    assert not torch.equal(compiled(x), results[0][0])
    torch._dynamo.reset()


def test_inputs_of_any_layout_and_length() -> None:
    layer = lora_layer()
    whole = torch.randn(4, 48)
    for x in (
        whole[:, ::2], whole[:, :24].t().contiguous().t(), whole[0, :24], whole[:0, :24],
        whole.view(2, 2, 48)[..., :24],
    ):  # fmt: skip
        assert assert_as_composed(layer, x).shape == (*x.shape[:-1], 20)


def test_each_row_of_a_mixed_batch_is_what_it_is_alone_for_any_method() -> None:
    class Shift(Method):
        """A method that only knows `output`, and no mixed batches."""

        tensors = ("shift",)
        prefix = "shift_"

        def make_state(self, config: Any, info: Any, shared: Any) -> Any:
            return {"shift": nn.Parameter(torch.zeros(info.out_features))}

        def merged(self, s: Any, shared: Any, w: Any, b: Any) -> Any:
            return w, s.shift if b is None else b + s.shift

        def output(self, s: Any, shared: Any, x: Any, y: Any, inner: Any) -> Any:
            return y + s.shift

    layer = lora_layer(names="ab")
    add_adapter(layer, "c", Shift(), TargetConfig())
    x = torch.randn(6, 2, 24, requires_grad=True)
    rows = ["c", "a", "__base__", "b", "a", "elsewhere"]
    y = layer(x, adapter_names=rows)
    for i, name in enumerate(rows):
        layer.set_adapter([name] if name in "abc" else [])
        alone = composed(layer, x[i : i + 1]).detach()
        exact = composed(copy.deepcopy(layer).double(), x[i : i + 1].double()).detach()
        assert_no_worse(y[i : i + 1].detach(), alone, exact, size_of(layer, x[i : i + 1]))
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


# Containers


def test_one_container_holds_modules_parameters_and_buffers_under_any_name() -> None:
    box = AdapterDict({"train": nn.Linear(2, 2), "keys": nn.Parameter(torch.ones(2)), "values": torch.zeros(3)})
    box.set("hidden", torch.ones(1), persistent=False)
    assert list(box) == ["train", "keys", "values", "hidden"]
    assert len(box) == 4
    assert set(box.state_dict()) == {"train.weight", "train.bias", "keys", "values"}
    assert dict(box.items())["values"] is box["values"]
    assert [n for n, _ in box.named_parameters()] == ["keys", "train.weight", "train.bias"]
    assert box.train(False)["train"].training is False
    twin = pickle.loads(pickle.dumps(copy.deepcopy(box)))
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), box.state_dict().values(), strict=True))
    twin.load_state_dict({k: v + 1 for k, v in box.state_dict().items()}, assign=True)
    assert torch.equal(twin["keys"], torch.full((2,), 2.0))
    assert isinstance(twin["keys"], nn.Parameter)
    box["keys"] = nn.Linear(1, 1)  # another kind under the same name
    assert len(box) == 4
    assert isinstance(box.pop("keys"), nn.Linear)
    assert "keys" not in box
    assert box.get("keys") is None
    assert box.pop("keys", None) is None
    with pytest.raises(KeyError):
        del box["keys"]
    with pytest.raises(KeyError, match="without dots"):
        box["a.b"] = torch.ones(1)
    with pytest.raises(TypeError, match="holds modules and tensors"):
        box["a"] = 3  # type: ignore[assignment]
    box.to(torch.float64)
    assert {t.dtype for t in box.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("base", SAMPLE_BASES)
def test_every_kind_of_layer_is_found_and_described(base: str) -> None:
    module = SAMPLE_BASES[base].make()
    found = weight_of(module)
    assert found is not None
    info = found.info("x")
    w, b = found.read()
    assert tuple(w.shape) == info.shape
    assert (b is not None) == info.has_bias
    x = SAMPLE_BASES[base].input()
    exact = copy.deepcopy(module).double()(x.double() if x.is_floating_point() else x)
    assert_no_worse(found.apply(x, w, b).detach(), module(x).detach(), exact.detach(), exact.detach().abs() + 1)


def test_modules_without_a_weight_that_is_understood_are_none_of_them() -> None:
    norm = nn.LayerNorm(4, elementwise_affine=False)
    for module in (nn.ReLU(), norm, nn.ConvTranspose2d(2, 2, 1), nn.LSTM(2, 2), nn.Sequential()):
        assert weight_of(module) is None
