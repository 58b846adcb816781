"""torch.compile in one graph: every method's layer, forward and backward, as eager computes it."""

from __future__ import annotations

import copy
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.layer.layer import AdapterLayer
from fastpeft.testing import SAMPLE_BASES, add_adapter, make_layer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_kernels.testing import assert_no_worse, assert_same_bits

KINDS = runpy.run_path(str(Path(__file__).with_name("kind_tools.py")))["kinds"]()
QUANTISED = runpy.run_path(str(Path(__file__).with_name("layer_tools.py")))["QUANTISED"]
BY_NAME = {type(kind.variant).__name__: kind for kind in KINDS}
pytestmark = pytest.mark.filterwarnings("ignore::fastpeft.config.types.PeftWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(kind: Any, base: str | nn.Module, names: str = "a") -> AdapterLayer:
    layer = make_layer(base) if isinstance(base, str) else AdapterLayer(base, "layer")
    layer.base_layer.requires_grad_(False)
    for name in names:
        add_adapter(layer, name, kind.method, kind.config())
    layer.set_adapter(names[0])
    return layer.train()


def results(call: Any, layer: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    """The output and every gradient."""
    torch.manual_seed(seed)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    if x.is_floating_point():
        leaves.append(x := x.clone().requires_grad_())
    y = call(x)
    grads = torch.autograd.grad(y.float().square().sum(), leaves, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def assert_compiled_as_eager(layer: AdapterLayer, x: Tensor, **options: Any) -> None:
    wide = copy.deepcopy(layer).double()
    eager = results(layer, layer, x)
    compiled = results(torch.compile(layer, **{"fullgraph": True, "backend": "aot_eager", **options}), layer, x)
    exact = results(wide, wide, x.double() if x.is_floating_point() else x)
    assert len(eager) == len(compiled) == len(exact) > 1
    for ours, theirs, true in zip(compiled, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype
        if true.numel():
            assert_no_worse(ours, theirs, true, true.abs().max().expand_as(true))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_every_method_is_one_graph(kind: Any) -> None:
    base = next(b for b in ("linear", *SAMPLE_BASES) if kind.adapts(b))
    assert_compiled_as_eager(adapted(kind, base), SAMPLE_BASES[base].input())


# OFT makes blocks of a number that depends on x's width; SHiRA calls an opaque operator.
@pytest.mark.parametrize(
    ("name", "backend"), [("Lora", "aot_eager"), ("Dora", "aot_eager"), ("Shira", "aot_eager"), ("OFT", "eager")]
)
def test_sizes_that_are_symbols(name: str, backend: str) -> None:
    layer = adapted(BY_NAME[name], "linear")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (3, 7):
        x = torch.randn(rows, 5, 24)
        wide = copy.deepcopy(layer).double()
        ours, theirs, exact = results(compiled, layer, x), results(layer, layer, x), results(wide, wide, x.double())
        for got, eager, true in zip(ours, theirs, exact, strict=True):
            assert_no_worse(got, eager, true, true.abs().max().expand_as(true))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0  # no second compilation


@pytest.mark.parametrize("base", QUANTISED)
@pytest.mark.parametrize("name", ["Lora", "Dora", "IA3"])
def test_on_a_quantised_base(name: str, base: str) -> None:
    layer = adapted(BY_NAME[name], QUANTISED[base]())
    x = torch.randn(3, 64)
    eager, compiled = (results(f, layer, x) for f in (layer, _compile(layer)))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert_no_worse(ours, theirs, theirs.double(), theirs.double().abs().max().expand_as(theirs))


def _compile(module: nn.Module, backend: Any = "aot_eager") -> Any:
    return torch.compile(module, fullgraph=True, backend=backend)


def test_inductor() -> None:
    assert_compiled_as_eager(adapted(BY_NAME["Lora"], "nf4"), SAMPLE_BASES["nf4"].input(), backend="inductor")


def test_norms_where_the_update_cancels_the_weight_in_a_graph() -> None:
    """The rows that eager finds by their values: a graph computes every row from W + B A."""
    layer = adapted(BY_NAME["Dora"], "linear")
    with torch.no_grad():  # r = 24 could undo W; a rank of 4 undoes four rows
        layer.scaling["a"] = 1.0
        layer.lora_A["a"].weight.copy_(-layer.weight[:4])
        layer.lora_B["a"].weight.zero_()[:4] = torch.eye(4) * (1 - 1e-5)
    assert_compiled_as_eager(layer, torch.randn(3, 24))


@pytest.mark.parametrize("flat", [False, True])
def test_opcheck_of_the_sparse_product(flat: bool) -> None:
    from fastpeft.methods.math import sparse

    assert sparse
    ops, x, values = torch.ops.fastpeft, torch.randn(2, 3, 8), torch.randn(4)
    indices = torch.tensor([3, 8, 21, 39]) if flat else torch.tensor([[4, 0, 2, 4], [0, 3, 7, 1]])
    torch.library.opcheck(ops.sparse_linear.default, (x, values, indices, 5, 8))
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.sparse_linear_backward.default, (torch.randn(2, 3, 5), x, values, indices, *need))


# What a user changes between two calls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(31, 24), nn.Linear(24, 20), nn.Linear(20, 24)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embed(input_ids))))


IDS = torch.arange(24).view(4, 6)
TARGETS = ["up", "down"]


def net(quantised: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    base = fastpeft.quantize_model(Net()) if quantised else Net()
    model = fastpeft.get_peft_model(base, fastpeft.LoraConfig(r=4, target_modules=TARGETS, **options), "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("b", fastpeft.IA3Config(target_modules=TARGETS, feedforward_modules=["down"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".b") or ".a." in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_a_change_of_state_is_seen_by_the_compiled_model(quantised: bool) -> None:
    model = net(quantised)
    compiled = _compile(model)
    seen: list[Tensor] = []

    def check(differs: bool = True) -> None:
        with torch.no_grad():
            y = model(IDS)
            assert_same_bits(compiled(IDS), y)
        if differs and seen:
            assert not torch.equal(y, seen[-1])
        seen.append(y)

    check()
    model.set_adapter("b")
    check()
    model.base_model.set_adapter(["a", "b"])
    check()
    model.set_adapter("a")
    with model.disable_adapter():
        check()
    check()
    assert_same_bits(seen[-1], seen[0])
    model.merge_adapter()
    check(differs=quantised)
    model.unmerge_adapter()
    check(differs=False)
    assert_same_bits(seen[-1], seen[0])
    for layer in model.modules():
        if isinstance(layer, AdapterLayer):
            layer.set_scale("a", 3.0)
    check()


def test_a_training_step_moves_what_the_compiled_model_computes() -> None:
    model = net(True).train()
    compiled = _compile(model)
    twin = copy.deepcopy(model)
    for each, call in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            call(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=["lora", "dora", "dropout"])
def test_checkpointing_and_autocast_agree(options: dict[str, Any], reentrant: bool) -> None:
    """Outputs and gradients under bfloat16 autocast: eager, checkpointed and (not reentrant) compiled."""
    model = net(True, **options).train()

    def plain(h: Tensor) -> Tensor:
        return model.base_model.model.down(torch.tanh(model.base_model.model.up(h)))

    def saving(h: Tensor) -> Tensor:
        return checkpoint(plain, h, use_reentrant=reentrant)

    ways = [plain, saving] if reentrant else [plain, saving, torch.compile(saving, fullgraph=True, backend="aot_eager")]

    def run(way: Any, dtype: torch.dtype | None) -> list[Tensor]:
        torch.manual_seed(5)
        h = torch.linspace(-1, 1, 72).view(3, 24).to(dtype or torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            y = way(h)
        model.zero_grad()
        y.double().square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in [h, *model.parameters()] if p.grad is not None)]

    eager, *others = [run(way, None) for way in ways]
    assert eager[0].dtype == torch.bfloat16
    exact = None
    if "use_dora" in options:  # a graph sums its norms in another order
        model.double()
        exact = run(plain, torch.float64)
    for other in others:
        for i, (ours, theirs) in enumerate(zip(other, eager, strict=True)):
            if exact is None or other is others[0]:
                assert_same_bits(ours, theirs)
            else:
                assert_no_worse(ours, theirs, exact[i], exact[i].abs().max().expand_as(theirs))


def test_arrow_routes_in_a_graph() -> None:
    def experts(**options: Any) -> Any:
        return fastpeft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **options)

    torch.manual_seed(0)
    model = fastpeft.get_peft_model(Net(), experts(), "task_0")
    for name in ("task_1", "task_2"):
        model.add_adapter(name, experts())
    model.add_adapter("router", experts(arrow_config=fastpeft.ArrowConfig(top_k=2, rng_seed=1)))
    model.set_adapter("router")
    compiled = _compile(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name or ".task_1." in name)
    exact = copy.deepcopy(model).double()
    for _ in range(2):
        for ours, theirs, true in zip(*(results(f, model, IDS) for f in (compiled, model)),
                                      results(exact, exact, IDS), strict=True):  # fmt: skip
            assert_no_worse(ours, theirs, true, true.abs().max().expand_as(true))
        for each in (model, exact):  # whose prototypes are others then
            each.base_model.model.up.lora_A["task_0"].weight.data.mul_(-2)


class Told(Net):
    """It tells its last states, as X-LoRA asks."""

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **others: Any) -> Any:
        y = super().forward(input_ids)
        return SimpleNamespace(hidden_states=(y,)) if output_hidden_states else y


def test_xlora_weighs_in_graphs(tmp_path: Path) -> None:
    """Several of them, as its two forwards are made around the model's."""
    for name in "ab":
        config = fastpeft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        fastpeft.get_peft_model(Told(), config).save_pretrained(tmp_path / name)
    torch.manual_seed(0)
    adapters = {name: str(tmp_path / name) for name in "ab"}
    model = fastpeft.get_peft_model(Told(), fastpeft.XLoraConfig(hidden_size=24, adapters=adapters))
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="aot_eager")
    for ids in (IDS, IDS.flip(0)):
        found = [results(f, m, ids) for f, m in ((compiled, model), (model, model), (exact, exact))]
        for ours, theirs, true in zip(*found, strict=True):
            assert_no_worse(ours, theirs, true, true.abs().max().expand_as(true))
        assert not torch.equal(found[0][0], model.base_model.model(ids))
    with model.disable_adapter():
        assert_same_bits(compiled(IDS), model(IDS))


def test_alora_finds_its_invocation_in_a_graph() -> None:
    model = fastpeft.get_peft_model(
        Net(), fastpeft.LoraConfig(r=4, target_modules=TARGETS, alora_invocation_tokens=[7, 8], init_lora_weights=False)
    )
    ids = IDS.clone()
    ids[3] = torch.tensor([7, 8, 1, 7, 8, 2])
    compiled = _compile(model)
    exact = copy.deepcopy(model).double()
    for batch in (ids, ids.flip(0)):  # other offsets, the same graph
        y = model(batch).detach()
        assert_no_worse(compiled(batch).detach(), y, exact(batch).detach(), y.double().abs().max().expand_as(y))
    with model.disable_adapter():
        base = model(ids)
    alone = (model(ids) != base).any(-1)
    assert alone.tolist()[0] == [False] * 6  # the base model's
    assert alone.tolist()[3] == [False] * 3 + [True] * 3


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    from torch._subclasses import FakeTensorMode

    model = net(True).bfloat16()
    y = model(IDS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(mode.from_tensor(IDS))
    assert (fake.shape, fake.dtype) == (y.shape, y.dtype)
