"""OFT, BOFT, HRA, RoAd, PSOFT, OSF, FourierFT, WaveFT and C3A beside live PEFT and where PEFT is wrong; their cost.

The laws (test_laws.py), golden files (test_golden.py) and the life of an adapter (test_life.py) hold them too.
"""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.registry import get_method
from fastpeft.testing import add_adapter
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))
LAYERS, agree, assert_as_good, cost_of = (tools[n] for n in ("LAYERS", "agree", "assert_as_good", "cost_of"))
assert_same_start, cases_of, input_of = (tools[n] for n in ("assert_same_start", "cases_of", "input_of"))
QUANTISED = runpy.run_path(str(Path(__file__).with_name("layer_tools.py")))["QUANTISED"]
model_of, pair, randomise, run = (tools[n] for n in ("model_of", "pair", "randomise", "run"))

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("OFTConfig", {"oft_block_size": 4}, "lin plain embedding pixel"),
    ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, "init_weights": False}, "lin embedding"),
    ("OFTConfig", {"r": 3, "oft_block_size": 0, "num_cayley_neumann_terms": 7, "block_share": True}, "lin embedding"),
    ("OFTConfig", {"oft_block_size": 5, "coft": True, "eps": 0.4, "num_cayley_neumann_terms": 3}, "lin"),
    ("OFTConfig", {"oft_block_size": 2, "num_cayley_neumann_terms": 2}, "lin"),
    ("BOFTConfig", {}, "lin plain wide"),
    ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 3, "init_weights": False}, "lin square"),
    ("HRAConfig", {"r": 4}, "lin plain square"),
    ("HRAConfig", {"r": 3, "apply_GS": True}, "lin square"),
    ("HRAConfig", {"r": 6, "init_weights": False}, "lin"),
    ("RoadConfig", {"group_size": 4}, "lin plain"),
    ("RoadConfig", {"group_size": 10, "variant": "road_2", "init_weights": False}, "lin"),
    ("RoadConfig", {"group_size": 2, "variant": "road_4"}, "lin"),
    ("PsoftConfig", {"r": 5}, "lin plain"),
    ("PsoftConfig", {"r": 4, "ab_svd_init": "pissa_init", "psoft_svd": "lowrank", "random_seed": 3}, "lin"),
    ("PsoftConfig", {"r": 3, "psoft_orth": False, "psoft_mag_b": False, "init_weights": False}, "lin"),
    ("PsoftConfig", {"r": 6, "psoft_mag_a": False, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}, "lin"),
    ("OSFConfig", {}, "lin wide"),
    ("OSFConfig", {"effective_rank": 3}, "lin plain wide"),
    ("OSFConfig", {"rank_pattern": {"ay": 0.7, "layer": 2}, "init_weights": False}, "lin"),
    ("OSFConfig", {"effective_rank": 1000}, "lin wide"),
    ("FourierFTConfig", {"n_frequency": 40, "scaling": 5.0}, "lin plain gpt2"),
    ("FourierFTConfig", {"n_frequency": 448, "init_weights": True, "random_loc_seed": 4, "scaling": 5.0}, "wide"),
    ("WaveFTConfig", {"n_frequency": 40, "scaling": 2.0}, "lin plain gpt2"),
    ("WaveFTConfig", {"n_frequency": 448, "scaling": 2.0, "wavelet_family": "sym4", "init_weights": False}, "wide"),
    ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "coif2", "random_loc_seed": 1, "scaling": 2.0}, "lin"),
    ("WaveFTConfig", {"n_frequency": 60, "use_idwt": False, "scaling": 2.0}, "lin gpt2"),
    ("C3AConfig", {"block_size": 4}, "lin plain wide"),
    ("C3AConfig", {"block_size": 2, "init_weights": "gaussian"}, "lin"),
    ("C3AConfig", {"block_size": 1, "init_weights": "kaiming_uniform"}, "lin"),
]  # fmt: skip
IDS = cases_of(CASES)


@pytest.mark.parametrize(("name", "options", "layer"), IDS)
def test_as_peft(name: str, options: dict[str, Any], layer: str) -> None:
    ours, theirs = pair(layer, name, options)
    assert_same_start(ours, theirs)
    randomise(ours, theirs)
    x = input_of(layer)
    exact = copy.deepcopy(theirs).double()
    results = [run(m, x.to(t) if x.is_floating_point() else x)
               for m, t in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64))]  # fmt: skip
    if name == "C3AConfig":
        results = [[*r[:1], *r[2:]] for r in results]  # PEFT's gradient of x is wrong: see below
    if name == "FourierFTConfig":  # PEFT makes its update in float32 always; ours is as exact in float64 as the layer
        results[2] = run(copy.deepcopy(ours).double(), x.double())
        assert_as_good(results[1], results[0], results[2])
    assert_as_good(*results)
    merged = [m.merge_and_unload() for m in (ours, theirs)]
    with torch.no_grad():
        assert_as_good(*[[m(x)] for m in merged], [results[2][0]])


@pytest.mark.parametrize("name", ["OFTConfig", "BOFTConfig", "HRAConfig", "RoadConfig", "PsoftConfig", "OSFConfig",
                                  "FourierFTConfig", "WaveFTConfig", "C3AConfig"])  # fmt: skip
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    options = next(options for n, options, _ in CASES if n == name)
    models, libraries = pair("lin", name, options), (fastpeft, peft)
    randomise(*models)
    x = input_of("lin")
    for i, (model, other) in enumerate(zip(models, libraries[::-1], strict=True)):
        model.save_pretrained(tmp_path / str(i))
        torch.manual_seed(0)
        base = nn.Sequential()
        base.add_module("layer", LAYERS["lin"][0]())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = other.PeftModel.from_pretrained(base, tmp_path / str(i)).eval()
        with torch.no_grad():  # where gradients are wanted, HRA computes in another order
            assert_same_bits(loaded(x), models[1 - i].eval()(x))


def assert_rounds_as(y: Tensor, eager: Tensor, exact: Tensor) -> None:
    """bfloat16's law: terms of a row are as large as its largest elements."""
    assert_no_worse(y.detach(), eager.detach(), exact.detach(), exact.abs().amax(-1, keepdim=True).expand_as(exact))


@pytest.mark.parametrize(("name", "options", "layer"), [p for p in IDS if p.values[2] in ("lin", "embedding")])
def test_half_precision(name: str, options: dict[str, Any], layer: str) -> None:
    model = model_of(fastpeft, layer, name, options)
    randomise(model)
    model.bfloat16()
    x = input_of(layer)
    exact = run(copy.deepcopy(model).double(), x.bfloat16().double() if layer == "lin" else x)[0]
    x = x.bfloat16() if layer == "lin" else x
    y = run(model, x)[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert_rounds_as(y, model.merge_and_unload()(x).detach(), exact)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o, layers in CASES if "lin" in layers.split()])
def test_bfloat16_bases_and_autocast(name: str, options: dict[str, Any]) -> None:
    """Adapters in float32 on a bfloat16 base are as exact as PEFT's; and a backward runs outside of autocast."""
    ours, theirs = (model_of(library, nn.Linear(24, 20).bfloat16(), name, options) for library in (fastpeft, peft))
    randomise(ours, theirs)
    x = torch.randn(64, 24).bfloat16()
    w, b = ours.base_model.model.layer.merged_weight(["default"])
    exact = nn.functional.linear(x.double(), w.double(), b.double())
    assert_rounds_as(ours(x), theirs(x), exact)
    model = ours.float()
    x = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *model.parameters()] if p.requires_grad)
    merged = model.merge_and_unload()
    exact = copy.deepcopy(merged).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert_rounds_as(y.bfloat16(), merged(x), exact)


# Where PEFT 0.21.2 is wrong


def test_c3as_gradient_towards_its_input_is_right_where_pefts_is_not() -> None:
    kernel, x = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 4), (2, 12)))
    inputs = (x.clone().requires_grad_(), kernel)
    assert not torch.autograd.gradcheck(BlockCircularConvolution.apply, inputs, raise_exception=False)
    model = model_of(fastpeft, "lin", "C3AConfig", {"block_size": 4, "init_weights": "gaussian"}).double()
    assert torch.autograd.gradcheck(model, torch.randn(3, 24, dtype=torch.float64, requires_grad=True), fast_mode=True)


@pytest.mark.parametrize(("name", "options"), [
    ("OFTConfig", {"oft_block_size": 4}), ("C3AConfig", {"block_size": 4}),
])  # fmt: skip
def test_two_adapters_compute_what_they_merge_to_where_pefts_do_not(name: str, options: dict[str, Any]) -> None:
    x, layer = torch.randn(3, 24), nn.Linear(24, 24)
    for library, right in ((fastpeft, True), (peft, False)):
        model = model_of(library, layer, name, options)
        model.add_adapter("b", getattr(library, name)(target_modules=["layer"], **options))
        model.base_model.set_adapter(["default", "b"])
        randomise(model)
        y = model.double()(x.double())
        model.merge_adapter()
        assert agree(y, model(x.double())) is right


@pytest.mark.parametrize(("name", "options"), [
    ("OFTConfig", {"oft_block_size": 6}), ("BOFTConfig", {"boft_block_size": 2}), ("HRAConfig", {"r": 2}),
])  # fmt: skip
@pytest.mark.parametrize("layer", ["conv1", "conv2", "square", "pixel", "conv3"])
def test_convolutions_start_as_they_were(name: str, options: dict[str, Any], layer: str) -> None:
    model, x = model_of(fastpeft, layer, name, options).double(), input_of(layer).double()
    assert agree(model(x), model.base_model.model.layer.base_layer(x))
    if name == "OFTConfig" and layer == "square":  # PEFT's folds patches that overlap
        theirs = model_of(peft, layer, name, options).double()
        assert not agree(theirs(x), model(x))


def test_butterfly_factors_are_pefts_formula() -> None:
    """PEFT has them with its CUDA extension alone; here is its formula, with its permutations, in dense matrices."""
    for factors, size, n in ((2, 4, 24), (3, 2, 24), (3, 4, 32)):
        base = nn.Linear(n, 20)
        model = model_of(fastpeft, base, "BOFTConfig", {"boft_block_size": size, "boft_n_butterfly_factor": factors})
        randomise(model)
        layer = model.double().base_model.model.layer
        r, rotation = layer.boft_R["default"], torch.eye(n, dtype=torch.float64)
        assert r.shape == (factors, n // size, size, size)
        for i in range(factors):
            order = BOFTLayer.block_butterfly_perm(None, n, n // size // 2**i, size // 2, factors - 1)
            p = torch.eye(n, dtype=torch.float64)[order]
            q = BOFTLayer.cayley_batch(None, r[i].detach())
            rotation = p @ torch.block_diag(*q) @ p.T @ rotation
        x = torch.randn(3, n, dtype=torch.float64)
        scaled = (x @ rotation @ layer.weight.T) * layer.boft_s["default"].flatten()
        assert agree(model(x), scaled + layer.bias)
        assert torch.autograd.gradcheck(model, x[:1].requires_grad_(), fast_mode=True)


def test_gram_schmidt_of_equal_vectors_is_no_noise() -> None:
    """HRA starts with pairs of equal vectors; PEFT normalises the rounding errors that are left of the second ones."""
    ours, theirs = pair("lin", "HRAConfig", {"r": 4, "apply_GS": True})
    x = input_of("lin")
    for model, huge in ((ours, False), (theirs, True)):
        gradient = run(model, x)[2]
        assert bool((gradient.abs().max() > 1e5) or not gradient.isfinite().all()) is huge
    layer = ours.double().base_model.model.layer
    q = torch.linalg.qr(layer.hra_u["default"][:, ::2]).Q
    expected = (x.double() @ (torch.eye(24) - 2 * q @ q.T)) @ layer.weight.T + layer.bias
    assert agree(ours(x.double()), expected)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("name", ["OFT", "BOFT", "HRA", "ROAD", "PSOFT", "OSF", "FOURIERFT", "WAVEFT", "C3A"])
@pytest.mark.parametrize("base", ["nf4", "bnb-nf4", "bnb-int8"])
def test_a_quantised_base_is_adapted_by_its_decoded_weight(name: str, base: str) -> None:
    method, layer = get_method(name), AdapterLayer(QUANTISED[base](), base)
    add_adapter(layer, "a", method, method.config_class(**method.examples[0]))
    layer.set_adapter("a")
    layer.eval()
    x = torch.randn(64, 64)
    with torch.no_grad():
        before = layer.base_layer(x)
        w, b = layer.merged_weight(["a"])
        expected, y = nn.functional.linear(x, w, b), layer(x)
        # What the layer's own arithmetic errs by, of 8 bits or of float32.
        own = (before - nn.functional.linear(x, *layer.merged_weight([]))).norm() / before.norm()
        own = own.clamp(min=64 * torch.finfo(torch.float32).eps)
        assert (y - expected).norm() <= 2 * own * expected.norm()
        error = layer.merge()
        assert error is not None
        assert (layer(x) - expected).norm() <= 2 * (error + own) * expected.norm()  # PEFT's HRA: garbage on 8 bits
        layer.unmerge()
        assert_same_bits(layer(x), y)


# Cost


@pytest.mark.parametrize(("name", "options", "most"), [
    ("OFTConfig", {}, lambda t, n: 6 * t * n * 32),
    ("BOFTConfig", {}, lambda t, n: 6 * t * n * 32),
    ("BOFTConfig", {"boft_n_butterfly_factor": 3}, lambda t, n: 3 * 8 * t * n * 32),  # the forward twice
    ("HRAConfig", {"r": 4}, lambda t, n: 3 * 4 * t * n * 4 + 10 * n * 4 * 4),
    ("HRAConfig", {"r": 4, "apply_GS": True}, lambda t, n: 3 * 4 * t * n * 4 + 10 * n * 4 * 4),
    ("RoadConfig", {}, lambda t, n: 0),
    ("FourierFTConfig", {}, lambda t, n: 0),
    ("WaveFTConfig", {}, lambda t, n: 0),
    ("WaveFTConfig", {"wavelet_family": "db4"}, lambda t, n: 3 * 2 * 2 * t * n * 8),
    ("C3AConfig", {"block_size": 16}, lambda t, n: 3 * 2 * t * n * n / 16),
    ("OSFConfig", {}, lambda t, n: 12 * t * n * n),
])  # fmt: skip
def test_costs(name: str, options: dict[str, Any], most: Any) -> None:
    """FLOPs are what the docstrings derive, and little beside x is kept for the backward."""
    t, n = 96, 256
    model = model_of(fastpeft, nn.Linear(n, n), name, options).train()
    randomise(model)
    flops, kept = cost_of(model, torch.randn(t, n))
    assert flops <= 1.02 * (4 * t * n * n + most(t, n))
    assert kept <= 1.5 * t * n * 4


@pytest.mark.parametrize("name", ["OFT", "BOFT"])
@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4"])
def test_a_rotation_and_its_layer_are_one_operator(name: str, base: str) -> None:
    """Kept beside x are blocks, and with BOFT's trained scale what it scales; hooks on the layer are honoured."""
    method, (t, n) = get_method(name), (512, 64)
    layer = AdapterLayer(nn.Linear(n, n).requires_grad_(False) if base == "dense" else QUANTISED[base](), "layer")
    add_adapter(layer, "a", method, method.config_class(target_modules=["layer"]))
    layer.set_adapter("a")
    layer.train()
    x, called = torch.randn(t, n), []
    plan = layer.plan()
    assert plan is not None
    y = plan(x)
    assert y is not None
    assert "ButterflyLinear" in type(y.grad_fn).__name__
    flops, kept = cost_of(layer, x.clone())
    assert flops <= 4 * t * n * layer.out_features + 6 * t * n * 32
    assert kept <= 4 * n * 32 * 4 + (t * layer.out_features * 4 if name == "BOFT" else 0)
    layer.base_layer.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        again = layer(x)
    assert called
    assert_rounds_as(again, y.detach(), layer.double()(x.double()).detach() if base == "dense" else y.detach().double())


class Called(TorchDispatchMode):
    """Names of the operators that are called, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "view" not in str(func) and "detach" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["OFT", "BOFT", "HRA"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_evaluation_keeps_what_it_turns_with(name: str, base: str) -> None:
    """Its forward is one call, until a parameter or the weight changes; training and gradients keep nothing."""
    method = get_method(name)
    layer = AdapterLayer(nn.Linear(64, 64).requires_grad_(False) if base == "dense" else QUANTISED[base](), "layer")
    add_adapter(layer, "a", method, method.config_class(target_modules=["layer"]))
    layer.set_adapter("a")
    x = torch.randn(2, layer.in_features)
    (part,) = (p for n, p in layer.named_parameters() if n.endswith(("oft_R.a.weight", "boft_R.a", "hra_u.a")))
    y = layer.eval()(x)
    assert torch.autograd.grad(y.sum(), part)[0].abs().sum() > 0
    with torch.no_grad():
        before = layer(x)
        with Called() as seen:
            again = layer(x)
        assert_same_bits(again, before)
        called = "lora_linear" if name == "HRA" else "butterfly_linear"
        assert seen.names == [f"peft_kernels.{called}.default"]
        held = [part, *([layer.base_layer.weight] if base == "dense" else [])]
        for changed in held:
            changed.add_(0.1 * torch.randn_like(changed))
            after = layer(x)
            assert not torch.equal(after, before)
            assert_same_bits(after, copy.deepcopy(layer)(x))
            before = after
        with Called() as seen:
            layer.train()(x)
    assert len(seen.names) > 1
