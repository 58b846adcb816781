"""LoRA's variants and AdaLoRA: beside PEFT where PEFT is right, and right where it is not."""

from __future__ import annotations

import copy
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import LoraConfig
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.registry import get_method
from fastpeft.testing import SAMPLE_BASES, add_adapter, assert_law, make_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels import draw_seed, philox, quantize_4bit
from peft_kernels.testing import assert_no_worse, assert_same_bits

LORA = get_method("LORA")
tools = runpy.run_path(str(Path(__file__).with_name("variants_tools.py")))
IDS, Net = tools["IDS"], tools["Net"]
assert_as_peft, close, pair, run, scatter = (tools[n] for n in ("assert_as_peft", "close", "pair", "run", "scatter"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::fastpeft.config.types.PeftWarning")


CASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dora": lambda p: {"r": 3, "use_dora": True, "target_modules": ["emb", "up", "gpt", "conv", "head"]},
    "dora-dropout": lambda p: {"r": 3, "use_dora": True, "lora_dropout": 0.4, "target_modules": ["up", "gpt", "head"]},
    "dora-random": lambda p: {"r": 4, "use_dora": True, "init_lora_weights": False, "target_modules": ["up", "conv"]},
    "bdlora": lambda p: {"r": 4, "use_bdlora": p.BdLoraConfig(["head"], ["up"], nblocks=2), "lora_dropout": 0.2,
                         "target_modules": ["up", "head"]},  # PEFT fails on Conv1D
    "velora": lambda p: {"r": 3, "velora_config": p.VeloraConfig(5), "target_modules": ["up", "gpt", "head"]},
    "velora-once": lambda p: {"r": 3, "velora_config": p.VeloraConfig(3, 0.5, "batch_average_once"),
                              "target_modules": ["up"], "lora_dropout": 0.3},
    "velora-random": lambda p: {"r": 3, "velora_config": p.VeloraConfig(4, 2.0, "random"), "target_modules": ["up"]},
}  # fmt: skip


class CounterDropout(nn.Module):
    """The dropout of our kernels, for PEFT's layers: its random numbers come from a counter."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return philox.dropout(x.flatten(0, -2), self.p, draw_seed()).view_as(x)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_start_outputs_gradients_and_merged_weights_are_those_of_peft(name: str, train: bool) -> None:
    if "bdlora" in name and train:
        pytest.skip("our dropout has its own stream of random numbers")
    for package in (fastpeft, peft):  # a seed gives the same start
        torch.manual_seed(5)
        model = package.get_peft_model(Net(), package.LoraConfig(**CASES[name](package)))
        start = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
        if package is fastpeft:
            mine = start
    assert mine.keys() == start.keys()
    for key, value in mine.items():
        assert_no_worse(value, start[key], start[key].double(), 8 * start[key].double().abs())
    ours, theirs = pair(CASES[name])
    for up in (theirs.base_model.model.up, theirs.base_model.model.head) if name == "dora-dropout" and train else ():
        up.lora_dropout["default"] = CounterDropout(0.4)
    assert_as_peft(ours, theirs, train)
    merged = [m.eval().merge_and_unload().state_dict() for m in (ours, theirs)]
    for key, value in merged[1].items():
        assert_no_worse(merged[0][key], value, value.double(), 8 * value.double().abs().max().expand(value.shape))


# --- choosing -----------------------------------------------------------------------------------------------------


def test_one_variant_at_a_time_and_none_that_is_silently_another() -> None:
    with pytest.raises(ValueError, match=r"use_\w+ and use_\w+: only one"):
        fastpeft.get_peft_model(Net(), LoraConfig(use_dora=True, use_qalora=True, target_modules=["up"]))
    for options, match in (
        ({"use_dora": True, "lora_bias": True}, "lora_bias=True is not supported for DoRA"),
        ({"use_qalora": True, "qalora_group_size": 5}, "divisible by qalora_group_size"),
        ({"use_qalora": True, "qalora_group_size": 0}, "positive integer"),
        ({"use_bdlora": fastpeft.BdLoraConfig(["x"])}, "matches neither"),
        ({"use_bdlora": fastpeft.BdLoraConfig(["up"], ["u"])}, "matches both"),
        ({"use_bdlora": fastpeft.BdLoraConfig(["up"], nblocks=5)}, "divisible by nblocks=5"),
        ({"use_bdlora": fastpeft.BdLoraConfig(None, ["up"]), "lora_bias": True}, "has no bias"),
        ({"velora_config": {"num_groups": 30}}, "more than 'up' has features"),
        ({"alora_invocation_tokens": ["a"], "task_type": "CAUSAL_LM"}, "list of token ids"),
        ({"monteclora_config": {"num_samples": 1 << 20}}, "at most"),
    ):
        model = Net()
        with pytest.raises(ValueError, match=match):
            fastpeft.get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["up"], **options}))
        assert not any(isinstance(m, AdapterLayer) for m in model.modules())
    for options in ({"use_bdlora": fastpeft.BdLoraConfig(["emb"])}, {"velora_config": {}}, {"use_qalora": True}):
        with pytest.raises(ValueError, match="cannot adapt 'emb'"):
            fastpeft.get_peft_model(Net(), LoraConfig(target_modules=["emb"], **options))
    with pytest.raises(ValueError, match="overlapping"):
        fastpeft.BdLoraConfig(["a"], ["a"])


def test_nested_configurations_come_from_dictionaries_and_have_pefts_fields() -> None:
    for field, name in (("use_bdlora", "BdLoraConfig"), ("velora_config", "VeloraConfig"),
                        ("monteclora_config", "MontecloraConfig")):  # fmt: skip
        ours, theirs = getattr(fastpeft, name)(), getattr(peft, name)()
        assert vars(ours) == vars(theirs)
        assert getattr(LoraConfig(**{field: vars(ours)}), field) == ours
        assert LoraConfig(**{field: ours}).to_dict()[field] == vars(theirs)


# --- on quantised layers, where PEFT silently trains a plain LoRA --------------------------------------------------


def _bnb(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        return bnb.nn.Linear4bit(64, 48, quant_type="nf4").to("cpu")
    return bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_variants_act_on_bitsandbytes_layers(bits: int) -> None:
    for options in (
        {"use_dora": True},
        {"use_bdlora": fastpeft.BdLoraConfig([""], nblocks=2)},
        {"use_bdlora": fastpeft.BdLoraConfig(None, [""], nblocks=4)},
        {"use_qalora": True},
        {"monteclora_config": fastpeft.MontecloraConfig(sample_scaler=0.1)},
        {"velora_config": fastpeft.VeloraConfig(num_groups=4)},
    ):
        layer = AdapterLayer(_bnb(bits), "q")
        add_adapter(layer, "a", LORA, LoraConfig(r=4, **options))
        layer.set_adapter("a")
        x = torch.randn(3, 64)
        w, b = layer.merged_weight(["a"])
        exact = nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
        # bitsandbytes' 8-bit layer rounds its input to 8 bits too.
        assert (layer.eval()(x) - exact).abs().max() < (2e-2 if bits == 8 else 1e-5) * exact.abs().max(), options
        assert (layer(x) - layer.base.call(x)).abs().max() > 0.1, options
        layer.train()
        before = layer(x)
        before.sum().backward()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad and p.is_floating_point()), options
        assert torch.equal(before, layer(x)) == ("monteclora_config" not in options), options


def test_safe_merge_with_lora_bias_on_a_4_bit_layer() -> None:
    layer = AdapterLayer(_bnb(4), "q")
    add_adapter(layer, "a", LORA, LoraConfig(r=4, lora_bias=True))
    layer.set_adapter("a")
    x = torch.randn(3, 64)
    y = layer(x)
    assert layer.merge(safe_merge=True) < 0.2
    assert (layer(x) - y).abs().max() < 0.2 * y.abs().max()


# --- DoRA -----------------------------------------------------------------------------------------------------------


def test_two_doras_and_a_dora_on_a_lora_are_their_merged_weight() -> None:
    # In PEFT each norms the base weight, so that two of them compute one thing and merge to another.
    for options in ([{"use_dora": True}, {"use_dora": True}], [{}, {"use_dora": True}], [{"use_dora": True}, {}]):
        for base in ("linear", "nf4", "embedding", "conv2d"):
            layer = make_layer(base)
            for name, more in zip("ab", options, strict=True):
                add_adapter(layer, name, LORA, LoraConfig(r=4, **more))
            assert_law(layer, ["a", "b"], SAMPLE_BASES[base].input())


def test_a_batch_can_mix_doras_with_others() -> None:
    ours = fastpeft.get_peft_model(Net(), LoraConfig(r=3, use_dora=True, target_modules=["emb", "up"]), "dora")
    ours.add_adapter("lora", LoraConfig(r=2, target_modules=["up", "gpt"]))
    for name in ("dora", "lora"):
        ours.set_adapter(name)
        scatter(ours)
    mixed = ours.eval()(IDS, adapter_names=["lora", "dora", "__base__"])
    for i, name in enumerate(["lora", "dora", "base"]):
        if name != "base":
            ours.set_adapter(name)
        # Not the same bits: torch's product of more rows, or on more threads, may sum in another order.
        alone = (Net() if name == "base" else ours)(IDS)[i]
        assert_no_worse(mixed[i], alone, alone.double(), 8 * alone.double().abs().max().expand(6, 31))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
def test_norms_hold_where_the_update_cancels_the_weight(cancelled: bool, quantised: bool) -> None:
    from fastpeft.methods.math.row_norms import norms
    from fastpeft.weights.find import weight_of
    from fastpeft.weights.nf4_linear import NF4Linear

    torch.manual_seed(0)
    base = nn.Linear(128, 40)
    module = NF4Linear(quantize_4bit(base.weight.detach(), nested=True), None) if quantised else base
    found = weight_of(module)
    assert found is not None
    w = found.read()[0].detach()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    a, b = vh, -(u * s)
    if not cancelled:
        a, b = torch.randn(6, 128), torch.randn(40, 6)
    else:  # every row but two is left with a millionth of itself
        b = b * (1 - 1e-3)
        b[3:5] = 0
    exact = (w.double() + b.double() @ a.double()).norm(dim=1)
    eager = (w + b @ a).norm(dim=1)
    assert_no_worse(norms(found, a, b), eager, exact, 8 * (exact + (w.norm(dim=1) * 1e-2 if cancelled else 0)))


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        own = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in own:
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantised", [False, True])
def test_dora_makes_no_dense_weight(quantised: bool, dropout: float) -> None:
    layer = AdapterLayer(nn.Linear(256, 192).requires_grad_(False), "x")
    if quantised:
        from fastpeft.weights.nf4_linear import NF4Linear

        layer = AdapterLayer(NF4Linear(quantize_4bit(layer.base_layer.weight, nested=True), None), "x")
    add_adapter(layer, "a", LORA, LoraConfig(r=4, use_dora=True, lora_dropout=dropout))
    layer.set_adapter("a")
    x = torch.randn(5, 256, requires_grad=True)
    with _Largest() as seen:
        layer(x).sum().backward()
    assert 0 < seen.numel < 256 * 192 // 4


def test_a_weight_that_changes_has_its_own_norms() -> None:
    layer = make_layer("linear")
    add_adapter(layer, "a", LORA, LoraConfig(r=4, use_dora=True))
    x = torch.randn(2, 24)
    for change in (
        lambda: layer.base_layer.weight.data.mul_(2.0),  # no new version
        lambda: torch.nn.init.normal_(layer.base_layer.weight),
        lambda: setattr(layer.base_layer.weight, "data", torch.randn(20, 24)),
        lambda: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(20, 24))),
    ):
        change()
        assert_law(layer, ["a"], x)


def test_a_bias_that_trains_under_dora_has_the_gradient_of_a_bias() -> None:
    layer = make_layer("linear")
    add_adapter(layer, "below", LORA, LoraConfig(r=2, lora_bias=True))
    add_adapter(layer, "a", LORA, LoraConfig(r=4, use_dora=True))
    layer.double().set_adapter(["below", "a"])
    layer.base_layer.requires_grad_(True)
    layer(torch.randn(2, 5, 24).double()).sum().backward()
    close(layer.base_layer.bias.grad, torch.full((20,), 10.0).double())
    close(layer.lora_B["below"].bias.grad, torch.full((20,), 10.0 * layer.scaling["below"]).double())


def test_dora_in_bfloat16_and_under_autocast() -> None:
    config = LoraConfig(r=3, use_dora=True, target_modules=["emb", "up", "gpt"])
    model = fastpeft.get_peft_model(Net().bfloat16(), config)
    scatter(model)
    assert model.base_model.model.up.lora_magnitude_vector["default"].weight.dtype == torch.float32
    y, exact = model(IDS), copy.deepcopy(model).double()(IDS)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    wide = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        run_in = wide(IDS)
    assert (run_in - exact).abs().max() < 0.05 * exact.abs().max()


# --- QA-LoRA ----------------------------------------------------------------------------------------------------------


def test_qalora_is_the_paper_s_pooling_and_its_merged_weight_is_exact() -> None:
    layer = make_layer("linear")
    config = LoraConfig(r=4, use_qalora=True, qalora_group_size=6)
    add_adapter(layer, "a", LORA, config)
    layer.double().set_adapter("a")
    x = torch.randn(7, 24).double()
    a, b = layer.lora_A["a"].weight, layer.lora_B["a"].weight
    assert a.shape == (4, 4)
    pooled = x.view(7, 4, 6).mean(2) * 4
    close(layer(x), layer.base_layer(x) + layer.scaling["a"] * pooled @ a.t() @ b.t())
    expected = layer.scaling["a"] * b @ a.repeat_interleave(6, 1) * 4 / 6
    close(layer.get_delta_weight("a"), expected)


# --- MonteCLoRA -------------------------------------------------------------------------------------------------------


def _monteclora(package: Any) -> dict[str, Any]:
    options = {"num_samples": 3, "buffer_size": 2, "sample_scaler": 0.1, "use_entropy": True, "kl_loss_weight": 0.5}
    return {"r": 4, "monteclora_config": package.MontecloraConfig(**options), "target_modules": ["up", "head"]}


def test_monteclora_s_evaluation_and_loss_are_those_of_peft() -> None:
    ours, theirs = pair(_monteclora)
    state = {k: v for k, v in theirs.state_dict().items() if "lora_" in k}
    ours.load_state_dict(state, strict=False)
    assert_same_bits(ours.eval()(IDS), ours(IDS))
    assert_as_peft(ours, theirs, train=False)
    assert ours._get_monteclora_loss() == 0.0
    for model in (ours, theirs):
        model.train().zero_grad()
    a, b = ours._get_monteclora_loss(), theirs._get_monteclora_loss()
    assert_no_worse(a, b, b.double(), 8 * b.double().abs())
    a.backward()
    b.backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if "prior" in name:
            close(p.grad, q.grad, times=64)


def test_monteclora_s_draws_have_the_distribution_of_pefts() -> None:
    ours, theirs = pair(_monteclora)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora_" in k}, strict=False)
    a, b = (m.base_model.model.up.lora_monteclora_sampler["default"] for m in (ours, theirs))
    torch.manual_seed(3)
    mine = torch.stack([a.noise(24) for _ in range(1500)])
    other = []
    for _ in range(1500):
        noise, weights = b()
        other.append(torch.einsum("n,nio->oi", weights, noise))
    other = torch.stack(other)
    # Spread of each row of A, and how heavy its tails are (the spread is drawn, too).
    for power in (2, 4):
        moments = [t.pow(power).mean((0, 2)) for t in (mine, other)]
        assert torch.allclose(moments[0], moments[1], rtol=0.1 * power, atol=0), power
    assert mine.mean().abs() < 4 * mine.std() / math.sqrt(mine.numel())


def test_monteclora_draws_in_training_only_and_trains_its_spread() -> None:
    ours, _ = pair(_monteclora)
    ours.train()
    torch.manual_seed(0)
    first, second = ours(IDS), ours(IDS)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(ours(IDS), first)
    (ours(IDS).square().mean() + ours._get_monteclora_loss()).backward()
    sampler = ours.base_model.model.up.lora_monteclora_sampler["default"]
    assert sampler.std_prior.grad.abs().sum() > 0
    assert sampler.expert_weights_prior.grad.abs().sum() > 0
    close(sampler.expert_weights.sum(), torch.tensor(1.0))
    copy.deepcopy(ours)
    before = copy.deepcopy(ours.base_model.model.up.weight)
    ours.merge_adapter()  # of a model that trains: without noise
    ours.eval()
    merged = ours(IDS)
    ours.unmerge_adapter()
    assert_same_bits(ours.base_model.model.up.weight, before)
    close(merged, ours(IDS))


# --- VeLoRA -----------------------------------------------------------------------------------------------------------


def test_velora_keeps_a_number_for_each_group_of_its_input() -> None:
    layer = make_layer("linear")
    layer.base_layer.requires_grad_(False)
    add_adapter(layer, "a", LORA, LoraConfig(r=4, velora_config=fastpeft.VeloraConfig(num_groups=3)))
    layer.set_adapter("a")
    layer.train()
    sizes: list[int] = []
    x = torch.randn(50, 24)
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(0 if t.untyped_storage().data_ptr() in own else t.numel()) or t, lambda t: t
    ):
        y = layer(x)
    assert sum(sizes) <= 50 * (3 + 4) + 8 + 4 * 24  # the groups, A x, v
    y.sum().backward()
    exact = layer.scaling["a"] * (torch.ones(50, 20) @ layer.lora_B["a"].weight).t() @ x
    got = layer.lora_A["a"].weight.grad
    assert got.flatten() @ exact.flatten() > 0  # an approximation that points the same way
    assert not torch.equal(got, exact)
