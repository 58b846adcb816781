"""A layer whose rows have adapters of their own: what is called how often, what is kept, stacks that a pool holds."""

from __future__ import annotations

import copy
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import BOFTConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig
from fastpeft.layer.by_row import mixed as routing
from fastpeft.layer.by_row import packed
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.registry import get_method
from fastpeft.testing import SAMPLE_BASES, add_adapter, make_layer
from torch import Tensor, nn

from peft_kernels import AdapterStack, PreparedCall, multi_lora_linear, native
from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("layer_tools.py")))
lora_layer, composed, size_of = (tools[name] for name in ("lora_layer", "composed", "size_of"))
ROWS = ["a", "b", "__base__", "a", "c"]


def x_of(rows: int = 5) -> Tensor:
    return torch.randn(rows, 3, 24)


def one_by_one(layer: AdapterLayer, rows: list[str], x: Tensor) -> Tensor:
    names = ([n] if n in layer.methods else [] for n in rows)
    return torch.cat([layer._compose(x[i : i + 1], n, (), {}) for i, n in enumerate(names)])


def assert_mixed(layer: AdapterLayer, x: Tensor, rows: list[str] | None = None, y: Tensor | None = None) -> Tensor:
    rows = rows or ROWS
    y = layer(x) if y is None else y
    exact = one_by_one(copy.deepcopy(layer).double(), rows, x.double())
    assert_no_worse(y.detach(), one_by_one(layer, rows, x).detach(), exact.detach(), exact.abs().max().expand_as(exact))
    return y


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often rows went through the kernel, and adapters into a stack."""
    found = {"calls": 0, "packed": 0}

    def count(name: str, of: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return of(*args, **kwargs)

        return run

    monkeypatch.setattr(routing, "multi_lora_linear", count("calls", multi_lora_linear))
    monkeypatch.setattr(routing, "PreparedCall", lambda function: count("calls", PreparedCall(multi_lora_linear)))
    packs = count("packed", packed.pack)
    monkeypatch.setattr(routing, "pack", packs)
    monkeypatch.setattr(packed, "pack", packs)
    return found


@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_rows_of_many_kinds_share_one_call_of_the_base(
    base: str, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = lora_layer(base, names="abc")
    others = {
        "ia3": IA3Config(feedforward_modules=[], target_modules=["x"]), "oft": OFTConfig(oft_block_size=4),
        "vera": VeraConfig(r=4), "dora": LoraConfig(r=2, use_dora=True), "bias": LoraConfig(lora_bias=True),
        "boft": BOFTConfig(), "hra": HRAConfig(r=2),
    }  # fmt: skip
    for name, config in others.items():
        add_adapter(layer, name, get_method(config.peft_type), config)
    rows = [*others, *ROWS, *others]
    layer.eval().set_rows(rows)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(type(layer.base), "call", None)  # nobody calls the base layer
        y = layer(x := x_of(len(rows)))
    assert counts == {"calls": 1, "packed": 1}
    assert_mixed(layer, x, rows, y)


def test_rows_of_one_adapter_are_an_ordinary_call(counts: dict[str, int]) -> None:
    layer, x = lora_layer(names="ab"), x_of()
    layer.set_rows(["b"] * 5)
    y = layer(x)
    layer.set_rows(None)
    layer.set_adapter("b")
    assert_same_bits(y, layer(x))
    assert counts == {"calls": 0, "packed": 0}


def test_stacks_are_kept_in_evaluation_and_shared_by_rows(counts: dict[str, int]) -> None:
    layer = lora_layer(names="abc")
    layer.requires_grad_(False)
    with torch.no_grad():
        for rows in (ROWS, ROWS, ["c", "a"], ["b", "__base__", "b", "c"], ROWS):
            for _ in range(2):
                layer.set_rows(rows)
                assert_mixed(layer, x_of(len(rows)), rows)
                layer.set_rows(None)
    assert counts == {"calls": 10, "packed": 1}
    layer.set_rows(ROWS)
    layer.set_requires_grad(["a"])
    layer(x_of()).sum().backward()  # a stack with gradients is not kept
    assert layer.lora_A["a"].weight.grad is not None
    assert layer.lora_A["b"].weight.grad is None
    assert counts == {"calls": 10, "packed": 1}


def test_rows_of_inference_mode_have_gradients_later() -> None:
    layer = lora_layer(names="abc")
    add_adapter(layer, "ia3", get_method("IA3"), IA3Config(feedforward_modules=[], target_modules=["x"]))
    rows = [*ROWS, "ia3"]
    layer.eval().set_rows(rows)
    x = x_of(len(rows))
    with torch.inference_mode():
        layer(x)
    layer.set_requires_grad(["a", "ia3"])
    layer(x).sum().backward()
    assert layer.lora_A["a"].weight.grad is not None
    assert layer.ia3_l["ia3"].grad is not None


def _write(layer: AdapterLayer) -> None:
    with torch.no_grad():
        layer.lora_B["a"].weight.mul_(-2)


def _write_unseen(layer: AdapterLayer) -> None:
    layer.lora_A["c"].weight.data.mul_(3)  # leaves no version


def _replace_parameter(layer: AdapterLayer) -> None:
    layer.lora_A["a"].weight = nn.Parameter(torch.randn(4, 24), requires_grad=False)


def _replace_module(layer: AdapterLayer) -> None:
    layer.lora_B["b"] = nn.Linear(4, 20, bias=False)


def _replace_with_another_kind(layer: AdapterLayer) -> None:
    layer.lora_B["b"] = nn.Sequential(nn.Linear(4, 20))


def _scale(layer: AdapterLayer) -> None:
    layer.set_scale("a", 2.5)


def _load(layer: AdapterLayer) -> None:
    layer.load_state_dict({key: value + 0.1 for key, value in layer.state_dict().items()})


def _delete(layer: AdapterLayer) -> None:
    layer.delete_adapter("c")


def _replace_adapter(layer: AdapterLayer) -> None:
    add_adapter(layer, "b", get_method("LORA"), LoraConfig(r=7))


def _train(layer: AdapterLayer) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.set_requires_grad(["a", "b"])
    layer.train()(x_of()).square().sum().backward()
    optimizer.step()
    layer.eval()


def _replace_base(layer: AdapterLayer) -> None:
    layer.base_layer.weight = nn.Parameter(torch.randn(20, 24), requires_grad=False)


def _base_trains(layer: AdapterLayer) -> None:
    layer.base_layer.weight.requires_grad_()


def _hook_on_the_base(layer: AdapterLayer) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)


def _hook_on_an_adapter(layer: AdapterLayer) -> None:
    layer.lora_A["b"].register_forward_hook(lambda module, args, y: y + 1)


def _disable(layer: AdapterLayer) -> None:
    layer.enable_adapters(False)
    layer.methods = {}  # for what is compared with


CHANGES = [
    _write, _write_unseen, _replace_parameter, _replace_module, _replace_with_another_kind, _scale, _load, _delete,
    _replace_adapter, _train, _replace_base, _base_trains, _hook_on_the_base, _hook_on_an_adapter, _disable,
]  # fmt: skip


AT_ONCE = {_write, _scale, _load, _delete, _replace_adapter, _train, _replace_base, _base_trains, _disable}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_forward(change: Callable[[AdapterLayer], None]) -> None:
    layer, x = lora_layer(names="abc"), x_of()
    layer.requires_grad_(False)
    layer.set_rows(ROWS)
    before = assert_mixed(layer, x)
    assert layer.rows.packed is not None
    change(layer)
    if change not in AT_ONCE:  # is found when the rows are assigned again, which every forward of a model does
        layer.set_rows(ROWS)
    assert not torch.equal(assert_mixed(layer, x), before) or change is _base_trains


def _write_base(layer: AdapterLayer) -> None:
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)


def _move_base(layer: AdapterLayer) -> None:
    layer.base_layer.weight.data = torch.randn(20, 24)  # the same parameter, elsewhere in memory


def forward_of_a_model(layer: AdapterLayer, x: Tensor) -> Tensor:
    """As a model calls it: nothing is written to before the rows are assigned again."""
    layer.set_rows(ROWS, steady=True)
    with torch.no_grad():
        assert_same_bits(y := layer(x), layer(x))
        return assert_mixed(layer, x, y=y)


@pytest.mark.parametrize("change", [*CHANGES, _write_base, _move_base])
def test_a_change_is_seen_by_the_next_forward_of_a_model(change: Callable[[AdapterLayer], None]) -> None:
    layer, x = lora_layer(names="abc"), x_of()
    layer.requires_grad_(False)
    for _ in range(2):
        before = forward_of_a_model(layer, x)
    assert layer.rows.last is not None
    if native.available() is None:
        assert layer.rows.last._kernel._last[False] is not None  # the short way
    change(layer)
    after = forward_of_a_model(layer, x)
    assert not torch.equal(after, before) or change is _base_trains
    assert_same_bits(forward_of_a_model(layer, x), after)


def test_changes_are_seen_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", {"cpu": "not here"})
    for change in (_write_unseen, _move_base):
        test_a_change_is_seen_by_the_next_forward_of_a_model(change)


def test_adapters_in_two_dtypes_and_float64_scalings() -> None:
    layer, x = lora_layer(names="abc", use_rslora=True, r=3), x_of()
    layer.lora_A["b"].to(torch.bfloat16)
    layer.lora_B["b"].to(torch.bfloat16)
    layer.set_rows(ROWS)
    y = layer(x)
    layer.lora_A["b"].float()
    layer.lora_B["b"].float()
    assert_mixed(layer, x, y=y)


@pytest.mark.parametrize("same", [True, False])
def test_every_row_is_dropped_by_its_own_adapters_probability(same: bool, counts: dict[str, int]) -> None:
    """A and B are identities, so that an adapter adds what dropout left of x."""
    chances = {"a": 0.5, "b": 0.5 if same else 0.25, "c": 0.5 if same else 0.0}
    layer = AdapterLayer(nn.Linear(24, 24), "layer")
    layer.base_layer.requires_grad_(False)
    for name, p in chances.items():
        add_adapter(layer, name, get_method("LORA"), LoraConfig(r=24, lora_alpha=24, lora_dropout=p))
        for module in (layer.lora_A[name], layer.lora_B[name]):
            nn.init.eye_(module.weight)
    layer.train().set_requires_grad([*chances])
    x = torch.randn(5, 40, 24)
    layer.set_rows(ROWS)
    y = layer(x)
    assert counts["calls"] == (0 if same else 1)  # where all agree it is one node of the graph (`by_row/train.py`)
    for i, name in enumerate(ROWS):
        base, p = layer.base_layer(x[i]), chances.get(name, 1.0)
        added = (y[i] - base).detach()
        kept = added.abs() > added.abs().median() * 1e-3 if p else torch.ones_like(added, dtype=torch.bool)
        if name == "__base__":
            assert_no_worse(y[i].detach(), base.detach(), base.double().detach(), base.abs().detach() + 1)
            continue
        assert abs(kept.double().mean() - (1 - p)) < 0.1
        exact = torch.where(kept, x[i].double() / (1 - p), 0.0)
        assert_no_worse(added, exact.float(), exact, base.abs() + exact.abs() + 1)
    with torch.no_grad():
        assert not torch.equal(layer(x), y) or all(p == 0 for p in chances.values())


def test_a_copy_and_a_pickle_hold_nothing_of_a_batch() -> None:
    layer, x = lora_layer(names="abc"), x_of()
    layer.set_rows(ROWS)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.rows.packed, twin.rows.last, twin._plan) == (None, None, None)
        assert_same_bits(twin(x), y)


def test_compiled_mixed_batches(counts: dict[str, int]) -> None:
    layer, x = lora_layer(names="abc"), x_of()
    layer.set_rows(ROWS)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert_mixed(layer, x, y=y)
    assert layer.rows.packed is None  # a graph keeps nothing


# Stacks that somebody else holds


def stack_of(layer: AdapterLayer, ranks: tuple[int, ...] = (3, 2)) -> AdapterStack:
    n, k = layer.out_features, layer.in_features
    return AdapterStack.pack([(torch.randn(r, k), torch.randn(n, r), 0.5 + r) for r in ranks])


def by_hand(layer: AdapterLayer, stack: AdapterStack, ids: list[int], x: Tensor) -> Tensor:
    w, b = (None if t is None else t.detach().to(x.dtype) for t in layer.base.read())
    assert w is not None
    rows = []
    for i, row in zip(ids, x, strict=True):
        y = nn.functional.linear(row, w, b)
        if i >= 0:
            own = slice(int(stack.starts[i]), int(stack.starts[i] + stack.ranks[i]))
            y = y + row @ stack.a[own].to(x.dtype).T @ stack.b[own].to(x.dtype) * stack.scaling[i].to(x.dtype)
        rows.append(y)
    return torch.stack(rows)


def assert_stacked(layer: AdapterLayer, stack: AdapterStack, ids: list[int], x: Tensor, y: Tensor) -> None:
    exact = by_hand(layer, stack, ids, x.double())
    assert_no_worse(y, by_hand(layer, stack, ids, x), exact, exact.abs().max().expand_as(exact))


@pytest.mark.parametrize("base", ["linear", "nf4", "linear-no-bias"])
def test_a_layer_computes_with_adapters_of_a_stack(base: str) -> None:
    layer = make_layer(base)
    layer.requires_grad_(False)
    plain, x, stack = layer(SAMPLE_BASES[base].input()), x_of(), stack_of(layer)
    before, ids = layer(x), torch.tensor([1, -1, 0, 1, 0])
    layer.set_row_stack(stack, ids)
    assert_stacked(layer, stack, ids.tolist(), x, layer(x))
    ids.copy_(torch.tensor([0, 0, -1, 1, -1]))  # in place, as between the replays of a CUDA graph
    assert_stacked(layer, stack, ids.tolist(), x, layer(x))
    stack.a.mul_(2)
    stack.ranks[1] = 0
    y = layer(x)
    assert_stacked(layer, stack, ids.tolist(), x, y)
    tokens = torch.tensor([0, 0, -1, 0, -1, -1, 0])
    layer.set_row_stack(stack, tokens)  # an adapter for each token of a flat batch
    flat = torch.randn(1, 7, 24)
    assert_stacked(layer, stack, tokens.tolist(), flat[0], layer(flat)[0])
    layer.train().eval()  # does not end it
    assert_stacked(layer, stack, tokens.tolist(), flat[0], layer(flat)[0])
    layer.enable_adapters(False)
    assert_same_bits(layer(x), before)
    layer.enable_adapters(True)
    layer.set_row_stack(None, None)
    assert_same_bits(layer(x), before)
    assert plain.shape == (2, 5, 20)


def test_a_stack_is_beside_adapters_of_the_layer() -> None:
    layer, x = lora_layer(names="abc"), x_of()
    before, stack = layer(x), stack_of(layer)
    layer.set_row_stack(stack, torch.full((5,), -1))
    assert_stacked(layer, stack, [-1] * 5, x, layer(x).detach())
    with pytest.raises(ValueError, match="adapters of a stack"):
        layer.set_rows(ROWS)
    layer.set_row_stack(None, None)
    assert_same_bits(layer(x), before)
    layer.set_rows(ROWS)
    with pytest.raises(ValueError, match="adapters by name"):
        layer.set_row_stack(stack, torch.zeros(5, dtype=torch.int64))
    layer.set_rows(None)
    layer.merge()
    layer.set_row_stack(stack, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="has merged adapters"):
        layer(x)


def test_layers_that_cannot_have_a_stack_say_so() -> None:
    stack, ids = stack_of(lora_layer()), torch.zeros(5, dtype=torch.int64)
    for base in ("conv2d", "embedding", "transformers-conv1d", "layernorm"):
        with pytest.raises(ValueError, match="cannot have a stack of adapters"):
            make_layer(base).set_row_stack(stack, ids)
    with pytest.raises(ValueError, match="None for both"):
        lora_layer().set_row_stack(stack, None)
    layer = make_layer("linear")
    layer.set_row_stack(stack, ids)
    with pytest.raises(ValueError, match="trains its weight"):
        layer(x_of())
    layer.base_layer.requires_grad_(False)
    with pytest.raises(ValueError, match="adapters"):
        layer(x_of(3))  # five places for three rows
