"""LoHa, LoKr, HiRA, GLoRA, DeLoRA, GraLoRA, MiSS and DEFT beside live PEFT, and what they cost.

The laws (test_laws.py), golden files (test_golden.py) and the life of an adapter (test_life.py) hold them too.
"""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.config.types import PeftWarning
from fastpeft.methods.lokr import factorize
from fastpeft.methods.math.factored import FactoredMethod
from fastpeft.methods.registry import get_method
from fastpeft.testing import add_adapter, make_layer
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

tools = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))
assert_near = tools["assert_near"]
peft_tools = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))
LAYERS, assert_as_good, assert_same_start, cases_of = (
    peft_tools[n] for n in ("LAYERS", "assert_as_good", "assert_same_start", "cases_of")
)
model_of, pair, randomise, run = (peft_tools[n] for n in ("model_of", "pair", "randomise", "run"))
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("LoHaConfig", {"r": 3, "alpha": 4}, "lin plain conv1 conv2 pixel groups"),
    ("LoHaConfig", {"r": 9, "init_weights": False}, "lin conv2"),
    ("LoHaConfig", {"r": 2, "use_effective_conv2d": True}, "lin conv1 conv2 pixel groups"),
    ("LoKrConfig", {"r": 1, "alpha": 4}, "lin plain conv1 conv2 pixel groups"),
    ("LoKrConfig", {"r": 12, "init_weights": False}, "lin conv1 conv2 pixel groups"),
    ("LoKrConfig", {"r": 1, "decompose_both": True, "init_weights": "lycoris"}, "lin conv1 conv2"),
    ("LoKrConfig", {"r": 1, "decompose_factor": 4, "use_effective_conv2d": True}, "lin conv2"),  # conv1: PEFT raises
    ("HiraConfig", {"r": 3}, "lin plain gpt2 conv1 conv2 pixel conv3"),
    ("HiraConfig", {"r": 2, "init_weights": "gaussian"}, "lin gpt2 conv1"),
    ("HiraConfig", {"r": 2, "init_weights": False}, "lin conv2"),
    ("GloraConfig", {"r": 3}, "lin plain"),
    ("GloraConfig", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, "lin plain"),
    ("GloraConfig", {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}, "lin"),
    ("GloraConfig", {"config_A_B": "none", "config_D_E": "vector", "init_weights": False}, "lin"),
    ("DeloraConfig", {"r": 3}, "lin plain"),
    ("DeloraConfig", {"r": 2, "delora_lambda": 4, "init_weights": False}, "lin"),
    ("GraloraConfig", {"r": 4, "alpha": 3}, "lin plain gpt2"),
    ("GraloraConfig", {"r": 8, "gralora_k": 4, "hybrid_r": 3, "init_weights": False}, "lin gpt2"),
    ("MissConfig", {"r": 6}, "lin plain"),
    ("MissConfig", {"r": 7, "init_weights": False}, "lin"),
    ("MissConfig", {"r": 4, "init_weights": "bat"}, "lin"),
    ("MissConfig", {"r": 7, "init_weights": "mini", "mini_r": 5}, "lin"),
    ("DeftConfig", {"r": 3, "alpha": 2}, "lin plain gpt2"),
    ("DeftConfig", {"r": 30, "decomposition_method": "qr"}, "lin"),
    ("DeftConfig", {"r": 3, "init_weights": False, "init_scale": 0.5}, "lin"),
    ("DeftConfig", {"r": 3, "para": True}, "lin gpt2"),
]  # fmt: skip
IDS = cases_of(CASES)


@pytest.mark.parametrize(("name", "options", "layer"), IDS)
def test_as_peft(name: str, options: dict[str, Any], layer: str) -> None:
    ours, theirs = pair(layer, name, options)
    assert_same_start(ours, theirs)
    randomise(ours, theirs)
    x = torch.randn(LAYERS[layer][1])
    exact = copy.deepcopy(theirs).double()
    models = (ours, theirs, exact)
    wrong = layer in ("conv1", "conv2", "groups") and options.get("use_effective_conv2d") and name == "LoHaConfig"
    if wrong:  # PEFT's gradients of hada_w1_a and hada_w2_a: see the test below
        results = [(model(x.to(next(model.parameters()).dtype)).detach(),) for model in models]
    else:
        results = [run(ours, x), run(theirs, x), run(exact, x.double())]
    assert_as_good(*results)
    assert_as_good(*[[m.merge_and_unload()(x.to(y[0].dtype)).detach()] for m, y in zip(models, results, strict=True)])


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_gradients_of_lohas_tucker_form_are_right_where_pefts_are_not(layer: str) -> None:
    ours, theirs = (m.double() for m in pair(layer, "LoHaConfig", {"r": 2, "use_effective_conv2d": True}))
    randomise(ours, theirs)
    ours.double(), theirs.double()
    x = torch.randn(LAYERS[layer][1], dtype=torch.float64)
    trained = dict(sorted((n, p) for n, p in ours.named_parameters() if p.requires_grad))
    names, values = list(trained), [p.detach().requires_grad_(True) for p in trained.values()]

    def call(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, tensors, strict=True)), x).sum(0)

    assert torch.autograd.gradcheck(call, values, fast_mode=True)
    ours_grads, their_grads = run(ours, x)[2:], run(theirs, x)[2:]
    differ = [n for n, a, b in zip(names, ours_grads, their_grads, strict=True) if (a - b).norm() > 1e-6 * b.norm()]
    assert all("w1_a" in n or "w2_a" in n for n in differ)
    assert len(differ) == 2, "PEFT is right now: compare the gradients above, and in test_golden.py"


@pytest.mark.parametrize(("name", "options", "layer"), [c for c in IDS if c.values[2] in ("lin", "plain")])
def test_bfloat16_and_compositions_agree(name: str, options: dict[str, Any], layer: str) -> None:
    """With a second adapter that does nothing, or a hook, the layer takes the slow path; half precision runs."""
    model = model_of(fastpeft, layer, name, options)
    randomise(model)
    x = torch.randn(LAYERS[layer][1])
    alone, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
    inner = model.base_model.model.layer
    model.zero_grad()
    handle = inner.base_layer.register_forward_hook(lambda *_: None)
    inner._plan = None
    assert_as_good(run(model, x), alone, exact)
    handle.remove()
    half = copy.deepcopy(model).bfloat16()
    y = half(x.bfloat16())
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert (y.double() - exact[0]).abs().max() < 0.1 * exact[0].abs().max() + 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


# Dropout


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
def test_rank_dropout_skips_output_channels(name: str) -> None:
    model = model_of(fastpeft, "lin", name, {"r": 2, "rank_dropout": 0.5})
    randomise(model)
    x = torch.randn(64, 24)
    base, full = model.base_model.model.layer.base_layer(x), model(x)
    assert torch.equal(model(x), full)
    model.train()
    ratios = torch.stack([((model(x) - base) / (full - base)).median(0).values for _ in range(20)])
    kept = ratios.abs() > 1e-3
    assert 0.3 < kept.float().mean() < 0.7
    assert ((ratios != ratios[0]).any(0)).all()
    per_step = ratios.sum(1) / kept.sum(1)
    scaled = name == "LoHaConfig"  # LoKr scales up with rank_dropout_scale alone
    expected = kept.shape[1] / kept.sum(1) if scaled else torch.ones(20)
    assert ((per_step - expected).abs() < 0.01).all()


def test_when_every_channel_is_dropped_the_update_is_zero() -> None:
    model = model_of(fastpeft, "lin", "LoHaConfig", {"r": 2, "rank_dropout": 1 - 1e-9}).train()
    randomise(model)
    x = torch.randn(2, 24)
    assert torch.equal(model(x), model.base_model.model.layer.base_layer(x))  # PEFT: NaN


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
def test_module_dropout_skips_the_layer(name: str) -> None:
    model = model_of(fastpeft, "lin", name, {"r": 2, "module_dropout": 0.5}).train()
    randomise(model)
    x = torch.randn(2, 24)
    base = model.base_model.model.layer.base_layer(x)
    skipped = [torch.equal(model(x), base) for _ in range(60)]
    assert 10 < sum(skipped) < 50
    assert not torch.equal(model.eval()(x), base)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("HiraConfig", {"r": 2, "hira_dropout": 0.5}), ("DeloraConfig", {"r": 2, "module_dropout": 0.5}),
        ("GraloraConfig", {"r": 4, "gralora_dropout": 0.5, "hybrid_r": 1}),
        ("MissConfig", {"r": 4, "miss_dropout": 0.5}), ("DeftConfig", {"r": 2, "deft_dropout": 0.5}),
    ],
)  # fmt: skip
def test_dropout_acts_on_the_adapters_input_in_training_alone(name: str, options: dict[str, Any]) -> None:
    model = model_of(fastpeft, "lin", name, options)
    randomise(model)
    x = torch.randn(1, 24)
    expected = model(x)
    assert torch.equal(model(x), expected)
    model.train()
    rows = model(x.repeat(2000, 1)).detach()
    assert (rows.std(0) > 0).all()
    assert ((rows.mean(0) - expected).abs() < 6 * rows.std(0) / 2000**0.5).all()


# What differs from PEFT on purpose, and errors


def test_two_miss_adapters_of_different_forms() -> None:
    """PEFT keeps the form once per layer: the second adapter is computed as if it had the first one's."""
    method, layer = get_method("MISS"), make_layer("linear")
    for name, form in (("a", True), ("b", "mini")):
        add_adapter(layer, name, method, fastpeft.MissConfig(r=4, mini_r=5, init_weights=form))
    layer.double()
    x = torch.randn(3, 24, dtype=torch.float64)
    for name in ("a", "b"):
        layer.set_adapter(name)
        w, b = layer.merged_weight([name])
        assert_near(layer(x), nn.functional.linear(x, w, b))


def test_hiras_ranks_are_one_as_pefts_are() -> None:
    options = {"r": 3, "rank_pattern": {"layer": 2}}
    with pytest.warns(PeftWarning, match="no effect"):
        ours = model_of(fastpeft, "lin", "HiraConfig", options)
    theirs = model_of(peft, "lin", "HiraConfig", options)
    assert ours.base_model.model.layer.hira_A["default"].shape == theirs.base_model.model.layer.hira_A["default"].shape


@pytest.mark.parametrize(
    ("name", "options", "layer", "match"),
    [
        ("LoHaConfig", {"r": 0}, "lin", "positive integer"),
        ("LoHaConfig", {"r": 10**7}, "lin", "at most 65536"),
        ("LoKrConfig", {"decompose_factor": 0}, "lin", "decompose_factor"),
        ("LoKrConfig", {"init_weights": "kaiming"}, "lin", "lycoris"),
        ("LoKrConfig", {"rank_dropout": 1.5}, "lin", r"in \[0, 1\)"),
        ("HiraConfig", {}, "groups", "groups=2"),
        ("HiraConfig", {"init_weights": "uniform"}, "lin", "gaussian"),
        ("DeloraConfig", {"rank_pattern": {"layer": -1}}, "lin", "positive integer"),
        ("DeloraConfig", {}, "conv2", "cannot adapt"),
        ("GraloraConfig", {"r": 6, "gralora_k": 3}, "lin", "out_features should be divisible by gralora_k, but got 20"),
        ("C3AConfig", {"block_size": 0}, "lin", "the block size is 0"),
        ("GraloraConfig", {"r": 5}, "lin", "divisible by gralora_k"),
        ("MissConfig", {"r": 25}, "lin", "less than or equal to in_features"),
        ("MissConfig", {"r": 5, "init_weights": "bat"}, "lin", "must be divisible by r "),
        ("MissConfig", {"r": 4, "init_weights": "bat", "miss_dropout": 0.1}, "lin", "cannot act"),
        ("MissConfig", {"r": 4, "init_weights": "mini", "mini_r": 3}, "lin", "divisible by `mini_r`"),
        ("MissConfig", {"init_weights": "ball"}, "lin", "'bat' or 'mini'"),
        ("GloraConfig", {"config_C": "constant"}, "lin", "Invalid config_C"),
        ("DeftConfig", {"decomposition_method": "svd"}, "lin", "Invalid decomposition_method"),
    ],
)
def test_errors(name: str, options: dict[str, Any], layer: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_of(fastpeft, layer, name, options)


def test_a_file_with_a_path_that_its_configuration_lacks_is_refused() -> None:
    method, layer = get_method("GLORA"), make_layer("linear")
    method.check_tensors(layer.info, {"glora_A.zeros": torch.zeros(2)})
    with pytest.raises(ValueError, match="should be zeros"):
        method.check_tensors(layer.info, {"glora_A.zeros": torch.ones(2)})


def test_factorize_as_peft() -> None:
    for factor in (-1, 1, 2, 3, 4, 8, 50):
        for size in (*range(1, 130), 768, 2048, 4099):
            assert factorize(size, factor) == factorization(size, factor)


@pytest.mark.parametrize("name", ["LOHA", "DELORA", "GRALORA", "MISS", "DEFT"])
def test_factors_are_the_whole_update(name: str) -> None:
    method, found = get_method(name), 0
    for example in method.examples:
        layer = make_layer("linear")
        add_adapter(layer, "a", method, method.config_class(**example))
        layer.double()
        own, view, w = layer.methods["a"], layer.view("a"), layer.weight
        factors = own.factors(view, view, w)
        if factors is not None:
            delta = own.merged(view, view, w, None)[0] - w
            assert_near(factors[1] @ factors[0], delta)
            found += 1
    assert found >= 1


# Cost

COSTS = {
    # FLOPs above the frozen layer's 4 T n^2, for n in and out features and T tokens; see each file's docstring.
    "LoHaConfig": ({"r": 3}, lambda t, n: 6 * t * 9 * 2 * n),
    "LoKrConfig": ({"r": 2}, lambda t, n: 6 * t * (2 * 2 * n + 2 * 8 * 8)),
    "HiraConfig": ({"r": 4}, lambda t, n: 2 * t * n * n + 8 * 4 * n * n),
    "GloraConfig": ({"r": 4}, lambda t, n: 2 * t * n * n + 16 * 4 * n * n + 8 * n * n),
    "DeloraConfig": ({"r": 4}, lambda t, n: 6 * t * 4 * 2 * n),
    "GraloraConfig": ({"r": 4}, lambda t, n: 6 * t * 4 * 2 * n),
    "MissConfig": ({"r": 8}, lambda t, n: 6 * t * 8 * n),
    "DeftConfig": ({"r": 4}, lambda t, n: 6 * t * 4 * 3 * n),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs are what the docstrings derive, and nothing of the weight's size is kept for the backward."""
    t, n = 48, 64
    options, extra = COSTS[name]
    model = model_of(fastpeft, nn.Linear(n, n), name, options).train()
    monkeypatch.setattr(FactoredMethod, "fused", lambda *_: None)  # the kernels' FLOPs are not counted
    randomise(model)
    x = torch.randn(t, n)
    flops, kept = peft_tools["cost_of"](model, x)
    assert kept <= 1.5 * x.nbytes
    assert flops <= 1.02 * (4 * t * n * n + extra(t, n))


def test_a_large_loha_keeps_no_weight() -> None:
    model = model_of(fastpeft, nn.Linear(256, 256), "LoHaConfig", {"r": 32}).train()
    randomise(model)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: (sizes.append(v.numel()), v)[1], lambda v: v):
        model(torch.randn(2, 256))
    base = 256 * 256
    assert sorted(sizes)[-2:] != [base, base]
    assert sum(size == base for size in sizes) <= 1  # the frozen layer's own weight


@pytest.mark.parametrize(
    ("name", "options"),
    [("HiraConfig", {"r": 3}), ("GloraConfig", {"r": 3}), ("GloraConfig", {"config_C": "none", "config_D_E": "none"}),
     ("MissConfig", {"r": 4, "init_weights": "bat"})],
)  # fmt: skip
@pytest.mark.parametrize("layer", ["lin", "plain"])
def test_one_token_is_computed_on_its_activations(name: str, options: dict[str, Any], layer: str) -> None:
    ours, theirs = (m.double() for m in pair(layer, name, options))
    randomise(ours, theirs)
    ours.double(), theirs.double()
    x = torch.randn(1, 24, dtype=torch.float64)
    for a, b in zip(run(ours, x), run(theirs, x), strict=True):
        assert_near(a, b)
    with torch.no_grad():
        for tokens in (x, x[0], torch.randn(1, 3, 24, dtype=torch.float64)):
            assert_near(ours(tokens), theirs(tokens))


@pytest.mark.parametrize(
    ("name", "options"),
    [("LoHaConfig", {"r": 2}), ("DeloraConfig", {"r": 3}), ("MissConfig", {"r": 4}), ("MissConfig", {"r": 5}),
     ("GraloraConfig", {"r": 2}), ("GraloraConfig", {"r": 2, "hybrid_r": 1})],
)  # fmt: skip
def test_the_kernel_computes_what_the_method_does(name: str, options: dict[str, Any]) -> None:
    model = model_of(fastpeft, nn.Linear(256, 192), name, options)
    randomise(model)
    inner, x = model.base_model.model.layer, torch.randn(2, 3, 256)
    exact = copy.deepcopy(model).double()
    assert inner.methods["default"].fused(inner, inner.view("default"), inner.view("default")) is not None
    for fast, value in zip(run(model, x), run(exact, x.double()), strict=True):
        assert_near(fast, value, growth=8)  # sums of 256 terms that cancel
