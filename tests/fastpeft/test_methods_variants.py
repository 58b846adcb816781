"""LoRA's variants and AdaLoRA: beside PEFT where PEFT is right, and right where it is not."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import AdaLoraConfig, LoraConfig
from fastpeft.layer import AdapterLayer
from fastpeft.method import get_method
from fastpeft.methods.variants.alora import offsets
from fastpeft.testing import SAMPLE_BASES, add_adapter, assert_law, make_layer
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from peft_kernels import quantize_4bit
from peft_kernels.testing import assert_no_worse, assert_same_bits

LORA = get_method("LORA")
IDS = torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::fastpeft.config.PeftWarning")


class Net(nn.Module):
    """Every kind of layer, in a row. With labels it gives a loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        torch.manual_seed(0)
        self.emb = nn.Embedding(31, 24)
        self.up = nn.Linear(24, 20)
        self.gpt = Conv1D(24, 20)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 31, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
        h = self.gpt(torch.tanh(self.up(self.emb(input_ids))))
        logits = self.head(self.conv(h.transpose(1, 2)).transpose(1, 2))
        if labels is None:
            return logits
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""


def scatter(model: nn.Module, scale: float = 0.3) -> None:
    """Move every trained number, by names, so that both packages' models get the same ones."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * scale)


def pair(options: Callable[[Any], dict[str, Any]], config: str = "LoraConfig") -> tuple[Any, Any]:
    """The same adapter here and in PEFT, its numbers moved from where they began. options: given a package."""
    models = []
    for package in (fastpeft, peft):
        torch.manual_seed(5)
        model = package.get_peft_model(Net(), getattr(package, config)(**options(package)))
        scatter(model)
        models.append(model)
    return models[0], models[1]


def run(model: nn.Module, train: bool, **kwargs: Any) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that weighs every output differently."""
    model.train(train)
    model.zero_grad()
    torch.manual_seed(9)
    y = model(IDS, **kwargs)
    (y * torch.arange(y.numel()).view_as(y).to(y.dtype).sin()).sum().backward()
    return {"output": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_as_peft(ours: Any, theirs: Any, train: bool, **kwargs: Any) -> None:
    a, b = run(ours, train, **kwargs), run(theirs, train, **kwargs)
    exact = run(copy.deepcopy(theirs).double(), train, **kwargs) if not train else b
    assert a.keys() == b.keys()
    for name, value in a.items():
        largest = exact[name].double().abs().max().expand(value.shape)
        worst = (b[name].double() - exact[name]).abs().max()
        assert_no_worse(value, (exact[name] + worst).to(value.dtype), exact[name].double(), 8 * largest)


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
        ({"use_bdlora": fastpeft.BdLoraConfig(["up"], nblocks=5)}, "equal blocks"),
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
        assert (layer(x) - layer.kind.call(layer.base_layer, x)).abs().max() > 0.1, options
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
    for i, name in enumerate(["lora", "dora"]):
        ours.set_adapter(name)
        alone = ours(IDS)[i]
        assert_no_worse(mixed[i], alone, alone.double(), 8 * alone.double().abs().max().expand(6, 31))
    assert_same_bits(mixed[2], Net()(IDS)[2])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
def test_norms_hold_where_the_update_cancels_the_weight(cancelled: bool, quantised: bool) -> None:
    from fastpeft.nf4 import NF4Linear
    from fastpeft.row_norms import norms
    from fastpeft.weights import weight_of

    torch.manual_seed(0)
    base = nn.Linear(128, 40)
    module = NF4Linear(quantize_4bit(base.weight.detach(), nested=True), None) if quantised else base
    kind = weight_of(module)
    assert kind is not None
    w = kind.read(module)[0].detach()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    a, b = vh, -(u * s)
    if not cancelled:
        a, b = torch.randn(6, 128), torch.randn(40, 6)
    else:  # every row but two is left with a millionth of itself
        b = b * (1 - 1e-3)
        b[3:5] = 0
    exact = (w.double() + b.double() @ a.double()).norm(dim=1)
    eager = (w + b @ a).norm(dim=1)
    assert_no_worse(norms(kind, module, a, b), eager, exact, 8 * (exact + (w.norm(dim=1) * 1e-2 if cancelled else 0)))


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
        from fastpeft.nf4 import NF4Linear

        layer = AdapterLayer(NF4Linear(quantize_4bit(layer.base_layer.weight, nested=True), None), "x")
    add_adapter(layer, "a", LORA, LoraConfig(r=4, use_dora=True, lora_dropout=dropout))
    layer.set_adapter("a")
    x = torch.randn(5, 256, requires_grad=True)
    layer(x)  # |W|^2 is made once
    with _Largest() as seen:
        layer(x).sum().backward()
    assert 0 < seen.numel < 256 * 192 // 4


def test_a_weight_that_changes_has_its_own_norms() -> None:
    layer = make_layer("linear")
    add_adapter(layer, "a", LORA, LoraConfig(r=4, use_dora=True))
    x = torch.randn(2, 24)
    for change in (
        lambda: layer.base_layer.weight.data.mul_(1.0),
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
    assert torch.allclose(layer.base_layer.bias.grad, torch.full((20,), 10.0).double())
    assert torch.allclose(layer.lora_B["below"].bias.grad, torch.full((20,), 10.0 * layer.scaling["below"]).double())


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
    assert torch.allclose(layer(x), layer.base_layer(x) + layer.scaling["a"] * pooled @ a.t() @ b.t())
    expected = layer.scaling["a"] * b @ a.repeat_interleave(6, 1) * 4 / 6
    assert torch.allclose(layer.get_delta_weight("a"), expected)


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
            assert torch.allclose(p.grad, q.grad, rtol=1e-4), name


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
        assert torch.allclose(moments[0], moments[1], rtol=0.1 * power), power
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
    assert torch.allclose(sampler.expert_weights.sum(), torch.tensor(1.0))
    copy.deepcopy(ours)
    before = copy.deepcopy(ours.base_model.model.up.weight)
    ours.merge_adapter()  # of a model that trains: without noise
    ours.eval()
    merged = ours(IDS)
    ours.unmerge_adapter()
    assert_same_bits(ours.base_model.model.up.weight, before)
    assert torch.allclose(merged, ours(IDS), atol=1e-5)


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
    assert not torch.allclose(got, exact)


# --- aLoRA ------------------------------------------------------------------------------------------------------------

ALORA = {"r": 3, "target_modules": ["up", "gpt"], "task_type": "CAUSAL_LM"}


def test_alora_s_offsets_are_those_of_peft() -> None:
    ids = torch.randint(0, 3, (40, 9), generator=torch.Generator().manual_seed(0))
    for tokens in ([1], [1, 2], [0, 0, 1], [2] * 9, [1] * 12):
        config = {"a": peft.LoraConfig(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")}
        assert offsets(ids, tokens) == calculate_alora_offsets(config, "a", ids)


def _alora(tokens: list[int]) -> Callable[[Any], dict[str, Any]]:
    return lambda package: {**ALORA, "alora_invocation_tokens": tokens}


def test_alora_computes_and_trains_as_pefts_does() -> None:
    tokens = IDS[1, 2:4].tolist()
    ours, theirs = pair(_alora(tokens))
    for kwargs in ({}, {"alora_offsets": [None, 2, 100]}):
        for train in (False, True):
            a, b = run_ids(ours, train, **kwargs), run_ids(theirs, train, **kwargs)
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert torch.allclose(value, b[name], atol=2e-5 * float(b[name].abs().max())), name
    base = Net()(IDS)
    y = ours.eval()(input_ids=IDS)
    assert torch.allclose(y[0], base[0], atol=1e-6)  # no invocation in this row
    assert torch.allclose(y[1, :1], base[1, :1], atol=1e-6)  # the convolution looks one token ahead
    assert not torch.allclose(y[1, 2:], base[1, 2:], atol=1e-3)
    with pytest.raises(ValueError, match="cannot be merged"):
        ours.merge_adapter()


def run_ids(model: nn.Module, train: bool, **kwargs: Any) -> dict[str, Tensor]:
    model.train(train)
    model.zero_grad()
    y = model(input_ids=IDS, **kwargs)
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    return {"output": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_alora_in_a_mixed_batch() -> None:
    tokens = IDS[1, 2:4].tolist()
    model = fastpeft.get_peft_model(Net(), LoraConfig(**ALORA, alora_invocation_tokens=tokens), "a")
    model.add_adapter("other", LoraConfig(**ALORA, alora_invocation_tokens=IDS[2, :1].tolist()))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["up"], task_type="CAUSAL_LM"))
    alone = {}
    for name in ("a", "other", "lora"):
        model.set_adapter(name)
        scatter(model)
        alone[name] = model.eval()(IDS)
    mixed = model(IDS, adapter_names=["lora", "a", "other"])
    for i, name in enumerate(["lora", "a", "other"]):
        assert torch.allclose(mixed[i], alone[name][i], atol=1e-5)
    model.set_adapter("lora")  # an aLoRA that is not active but in the batch
    assert torch.allclose(model(IDS, adapter_names=["a"] * 3), alone["a"], atol=1e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.set_adapter("a")
        with pytest.raises(TypeError):
            model(inputs_embeds=torch.zeros(1))
    assert any("base model answers" in str(w.message) for w in caught)


def test_alora_generates_what_peft_does_with_and_without_a_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=31, num_key_value_heads=1)).eval()

    texts = []
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False,
               "task_type": "CAUSAL_LM", "alora_invocation_tokens": [7, 3]}  # fmt: skip
    ids = torch.tensor([[4, 7, 3, 9, 2], [1, 2, 5, 7, 3], [1, 2, 3, 4, 5]])
    for package in (fastpeft, peft):
        model = package.get_peft_model(llama(), package.LoraConfig(**options))
        scatter(model, 0.5)
        model.eval()
        texts.append(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
        if package is fastpeft:
            # PEFT moves the start along with the end, so that without a cache the invocation falls out again.
            without = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
            beams = model.generate(input_ids=ids, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0)
            several = model.generate(input_ids=ids, max_new_tokens=2, num_return_sequences=2, do_sample=True)
            with model.disable_adapter():
                plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(*texts)
    assert torch.equal(texts[0], without)
    assert beams.shape == (3, 9)
    assert several.shape == (6, 7)
    assert torch.equal(texts[0][2], plain[2])
    assert not torch.equal(texts[0], plain)


def test_alora_under_checkpointing_says_when_it_cannot_know_the_batch() -> None:
    class Checkpointed(Net):
        def forward(self, input_ids: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(super().forward, input_ids, use_reentrant=False)

    tokens = IDS[1, 2:4].tolist()
    model = fastpeft.get_peft_model(Checkpointed(), LoraConfig(**ALORA, alora_invocation_tokens=tokens)).train()
    scatter(model)
    model(IDS).sum().backward()
    loss = model(IDS.roll(1, 0)).sum() + model(IDS).sum()
    with pytest.raises(ValueError, match="call backward"):
        loss.backward()
    model(IDS.roll(1, 0)).sum().backward()


# --- AdaLoRA ----------------------------------------------------------------------------------------------------------

ADALORA = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12, "lora_alpha": 7,
           "target_modules": ["up", "gpt", "head"], "orth_reg_weight": 0.3}  # fmt: skip


def _train(model: Any, steps: range) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in steps:
        loss = model(IDS, labels=IDS.flip(1)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adalora_trains_allocates_and_saves_as_pefts_does(tmp_path: Any) -> None:
    # Without a task PEFT's model leaves the regularisation out of its loss.
    ours, theirs = pair(lambda package: {**copy.deepcopy(ADALORA), "task_type": "CAUSAL_LM"}, "AdaLoraConfig")
    assert_as_peft(ours, theirs, train=False)
    for step in range(1, 15):
        a, b = (_train(m.train(), range(step, step + 1))[0] for m in (ours, theirs))
        assert abs(a - b) < 1e-4 * abs(b), step
        patterns = [m.peft_config["default"].rank_pattern for m in (ours, theirs)]
        kept = {k.replace(".default", ""): v for k, v in (patterns[1] or {}).items()}
        assert (patterns[0] or {}) == kept, step
    assert sum(map(sum, kept.values())) == 2 * 3
    assert any(len(v) != sum(v) for v in kept.values())

    y = ours.eval()(IDS)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [fastpeft.checkpoint.load_adapter_file(tmp_path / n) for n in ("ours", "theirs")]
    assert files[0][0]["rank_pattern"] == files[1][0]["rank_pattern"] == kept
    shapes = [{k: v.shape for k, v in f[1].items()} for f in files]
    assert shapes[0] == shapes[1]
    for folder in ("ours", "theirs"):
        for package in (fastpeft, peft):
            again = package.PeftModel.from_pretrained(Net(), tmp_path / folder).eval()
            assert torch.allclose(again(IDS), y, atol=1e-4 * float(y.abs().max())), (folder, package)
    assert again.base_model.model.up.lora_A["default"].shape[0] == sum(kept["up.lora_E"])
    # Into the adapter that is there, as Trainer does with the best checkpoint.
    scatter(ours, 0.1)
    ours.load_adapter(tmp_path / "ours", "default")
    assert ours.base_model.model.up.lora_A["default"].shape[0] == sum(kept["up.lora_E"])
    assert torch.allclose(ours.eval()(IDS), y, atol=1e-6)


def test_adalora_gives_the_whole_budget_where_target_and_start_agree() -> None:
    model = fastpeft.get_peft_model(Net(), AdaLoraConfig(init_r=3, target_r=3, total_step=6, target_modules=["up"]))
    scatter(model)
    _train(model, range(1, 7))  # PEFT asks for the 0th smallest here, and fails
    assert model.peft_config["default"].rank_pattern == {"up.lora_E": [True] * 3}


def test_adalora_in_a_model_with_other_adapters() -> None:
    model = fastpeft.get_peft_model(Net(), LoraConfig(r=2, target_modules=["up"]), "lora")
    model.add_adapter("ada", AdaLoraConfig(**ADALORA))
    model.set_adapter(["lora", "ada"])
    scatter(model)
    plain = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flip(1).flatten())
    a = [p for n, p in model.named_parameters() if "ada" in n and "lora_A" in n]
    b = [p.t() for n, p in model.named_parameters() if "ada" in n and "lora_B" in n]
    orthogonal = sum((m @ m.t() - torch.eye(5)).norm() for m in a + b) / len(a + b)
    assert torch.allclose(model(IDS, labels=IDS.flip(1)).loss, plain + 0.3 * orthogonal)
    _train(model, range(1, 13))
    assert model.peft_config["ada"].rank_pattern.keys() == {"up.lora_E", "gpt.lora_E", "head.lora_E"}
    model.set_adapter("lora")
    assert torch.allclose(model(IDS, labels=IDS.flip(1)).loss,
                          nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flip(1).flatten()))  # fmt: skip


def test_adalora_on_convolutions_is_its_merged_weight() -> None:
    for base in ("conv1d", "conv2d", "conv2d-circular", "conv2d-groups", "conv3d"):
        layer = make_layer(base)
        add_adapter(layer, "a", get_method("ADALORA"), AdaLoraConfig(init_r=4, total_step=9))
        assert_law(layer, ["a"], SAMPLE_BASES[base].input())


def test_adalora_refuses_what_has_no_meaning() -> None:
    for options, match in (
        ({"total_step": None}, "total_step"), ({"tinit": 9}, "budgeting phase"), ({"orth_reg_weight": -1}, "at least"),
        ({"use_dora": True}, "no meaning"), ({"use_rslora": True}, "no meaning"), ({"init_r": 0}, "init_r"),
        ({"init_lora_weights": "pissa"}, "a bool"), ({"beta1": 1.0}, "beta1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            fastpeft.get_peft_model(Net(), AdaLoraConfig(**{**ADALORA, **options}))
    with pytest.raises(ValueError, match="cannot adapt 'emb'"):
        fastpeft.get_peft_model(Net(), AdaLoraConfig(**{**ADALORA, "target_modules": ["emb"]}))
