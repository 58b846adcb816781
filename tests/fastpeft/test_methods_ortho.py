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
from fastpeft.config import PeftWarning
from fastpeft.method import get_method
from fastpeft.methods.oft import nearest_divisor
from fastpeft.rotation import BlockDropout, cayley, skew
from fastpeft.spectral import Fourier, Wavelet
from fastpeft.testing import add_adapter, make_layer
from fastpeft.wavelets import LOW_PASS, filters
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from peft.tuners.waveft.wavelet import Wavelet as PeftWavelet
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))
LAYERS, assert_as_good, cost_of, input_of = (tools[n] for n in ("LAYERS", "assert_as_good", "cost_of", "input_of"))
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
IDS = [
    pytest.param(name, options, layer, id=f"{name}-{i}-{layer}")
    for i, (name, options, layers) in enumerate(CASES)
    for layer in layers.split()
]


@pytest.mark.parametrize(("name", "options", "layer"), IDS)
def test_as_peft(name: str, options: dict[str, Any], layer: str) -> None:
    ours, theirs = pair(layer, name, options)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(state[key], value)
    randomise(ours, theirs)
    x = input_of(layer)
    exact = copy.deepcopy(theirs).double()
    results = [run(m, x.to(t) if x.is_floating_point() else x)
               for m, t in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64))]  # fmt: skip
    if name == "C3AConfig":
        results = [[*r[:1], *r[2:]] for r in results]  # PEFT's gradient of x is wrong: see below
    if name == "FourierFTConfig":  # PEFT makes its update in float32 always; ours is as exact in float64 as the layer
        results[2] = run(copy.deepcopy(ours).double(), x.double())
        assert all(torch.allclose(b.double(), c, atol=1e-4) for b, c in zip(*results[1:], strict=True))
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
        assert_same_bits(loaded(x).detach(), models[1 - i](x).detach())


@pytest.mark.parametrize(("name", "options", "layer"), [p for p in IDS if p.values[2] in ("lin", "embedding")])
def test_half_precision(name: str, options: dict[str, Any], layer: str) -> None:
    model = model_of(fastpeft, layer, name, options)
    randomise(model)
    x = input_of(layer)
    exact = run(copy.deepcopy(model).double(), x.double() if layer == "lin" else x)[0]
    for cast in (lambda m: m.bfloat16(), _half_base):
        half = cast(copy.deepcopy(model))
        y = half(x.bfloat16() if layer == "lin" else x)
        y.sum().backward()
        assert y.dtype is torch.bfloat16
        assert (y.double() - exact).abs().max() < 0.1 * exact.abs().max()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


def _half_base(model: Any) -> Any:
    model.base_model.model.layer.base_layer.bfloat16()
    return model


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
        y = model(x).detach()
        model.merge_adapter()
        assert torch.allclose(y, model(x), atol=1e-5) is right


@pytest.mark.parametrize(("name", "options"), [
    ("OFTConfig", {"oft_block_size": 6}), ("BOFTConfig", {"boft_block_size": 2}), ("HRAConfig", {"r": 2}),
])  # fmt: skip
@pytest.mark.parametrize("layer", ["conv1", "conv2", "square", "pixel", "conv3"])
def test_convolutions_start_as_they_were(name: str, options: dict[str, Any], layer: str) -> None:
    model, x = model_of(fastpeft, layer, name, options), input_of(layer)
    assert torch.allclose(model(x), model.base_model.model.layer.base_layer(x), atol=1e-5)
    if name == "OFTConfig" and layer == "square":  # PEFT's folds patches that overlap
        theirs = model_of(peft, layer, name, options)
        assert not torch.allclose(theirs(x), model(x), atol=0.1)


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
        assert torch.allclose(model(x), scaled + layer.bias)
        assert torch.autograd.gradcheck(model, x[:1].requires_grad_(), fast_mode=True)


def test_gram_schmidt_of_equal_vectors_is_no_noise() -> None:
    """HRA starts with pairs of equal vectors; PEFT normalises the rounding errors that are left of the second ones."""
    ours, theirs = pair("lin", "HRAConfig", {"r": 4, "apply_GS": True})
    x = input_of("lin")
    for model, huge in ((ours, False), (theirs, True)):
        gradient = run(model, x)[2]
        assert bool((gradient.abs().max() > 1e5) or not gradient.isfinite().all()) is huge
    once = ours.base_model.model.layer.hra_u["default"][:, ::2]
    q = torch.linalg.qr(once).Q
    expected = nn.functional.linear(x @ (torch.eye(24) - 2 * q @ q.T), ours.base_model.model.layer.weight)
    assert torch.allclose(ours(x), expected + ours.base_model.model.layer.bias, atol=1e-5)


# Options that act in training


def test_module_dropout_of_oft_works() -> None:
    model = model_of(fastpeft, "lin", "OFTConfig", {"oft_block_size": 4, "module_dropout": 0.5})  # PEFT ignores it
    randomise(model)
    x, base = torch.randn(1, 24), model.base_model.model.layer.base_layer
    assert torch.equal(model(x), model(x))
    model.train()
    rotated = base.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    seen: list[Tensor] = []
    for _ in range(5):
        model(x)
    kept = torch.stack(seen).view(5, 6, 4) == x.view(6, 4)
    assert (kept.all(-1).sum(-1) == 3).all()
    assert not (kept[0] == kept).all()
    rotated.remove()


def test_boft_dropout_draws_as_peft() -> None:
    blocks = torch.randn(2, 6, 3, 3)
    theirs = peft.tuners.boft.layer.MultiplicativeDropoutLayer(0.5)
    for ours in (BlockDropout(0.5), BlockDropout(0.0)):
        theirs.p = ours.p
        torch.manual_seed(2)
        expected = theirs(blocks)
        torch.manual_seed(2)
        assert_same_bits(ours(blocks), expected)
        assert torch.equal(ours.eval()(blocks), blocks)


def test_psoft_dropout() -> None:
    model = model_of(fastpeft, "lin", "PsoftConfig", {"r": 4, "psoft_dropout": 0.5})
    randomise(model)
    x = torch.randn(1, 24)
    expected, rows = model(x), model.train()(x.repeat(2000, 1)).detach()
    assert (rows.std(0) > 0).all()
    assert ((rows.mean(0) - expected).abs() < 6 * rows.std(0) / 2000**0.5).all()


def test_coft_keeps_the_generator_small() -> None:
    ours, theirs = pair("lin", "OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.1})
    randomise(ours, theirs)
    own, other = (m.base_model.model.layer.oft_R["default"] for m in (ours, theirs))
    before = own.weight.clone()
    ours(input_of("lin"))
    assert_same_bits(own.weight, before)  # PEFT changes it even in eval
    ours.train()(input_of("lin")), theirs(input_of("lin"))
    assert torch.allclose(own.weight, other.weight)
    assert not torch.equal(own.weight, before)


def test_osf_trains_in_the_complement_of_the_frozen_directions() -> None:
    for layer in ("lin", "wide"):
        model = model_of(fastpeft, layer, "OSFConfig", {"effective_rank": 5})
        own = model.base_model.model.layer
        u, _, v = torch.linalg.svd(own.weight, full_matrices=False)
        for tokens in (2, 500):  # either order of the projection
            model.zero_grad()
            run(model, torch.randn(tokens, own.in_features))
            params = own.osf_svd_params["default"]
            assert (u[:, :5].T @ params["U_low"].grad).abs().max() < 1e-4 * tokens
            assert (params["V_low"].grad @ v[:5].T).abs().max() < 1e-4 * tokens
        model(torch.randn(3, own.in_features))
        before = own.weight.clone()
        randomise(model)
        model.merge_adapter()
        assert not torch.equal(own.weight, before)
        model.unmerge_adapter()  # PEFT cannot
        assert_same_bits(own.weight.detach(), before.detach())


def test_osf_targets_every_linear_layer_where_it_knows_no_default() -> None:
    for library in (fastpeft, peft):
        base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        model = library.get_peft_model(base, library.OSFConfig())
        assert len([n for n, _ in model.named_parameters() if n.endswith("U_low")]) == 2


# Sizes, places and errors


def test_block_sizes_are_adjusted_as_peft_does() -> None:
    for n in (6, 24, 60, 97, 128):
        for wanted in range(1, 140):
            assert nearest_divisor(n, wanted) == OFTLayer.adjust_oft_parameters(None, n, wanted)
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(24, 20))
    with pytest.warns(PeftWarning, match=r"Invalid `oft_block_size` \(7\)! Adjusted `oft_block_size` to \(6\)"):
        model = fastpeft.get_peft_model(base, fastpeft.OFTConfig(target_modules=["layer"], oft_block_size=7))
    assert model.base_model.model.layer.oft_R["default"].weight.shape == (4, 15)


@pytest.mark.parametrize("terms", range(1, 9))
def test_truncated_cayley_is_pefts(terms: int) -> None:
    vector = torch.randn(3, 10, dtype=torch.float64) * 0.1
    theirs = OFTRotationModule(3, 10, 5, 15)._cayley_batch(vector, 5, True, terms)
    assert torch.allclose(cayley(skew(vector, 5), terms), theirs)


def test_wavelets_are_those_of_peft() -> None:
    for family in LOW_PASS:
        theirs = PeftWavelet(family)
        assert filters(family) == (tuple(theirs.rec_lo), tuple(theirs.rec_hi))


@pytest.mark.parametrize("transform", [
    Fourier(8), Fourier(7), *(Wavelet(n, *filters(f)) for n in (7, 8) for f in ("db1", "db3")),
])  # fmt: skip
def test_transforms_and_their_adjoints(transform: Any) -> None:
    x, z = torch.randn(3, transform.n, dtype=torch.float64), torch.randn(3, transform.size, dtype=torch.float64)
    assert transform(x).shape == z.shape
    assert torch.allclose((transform(x) * z).sum(-1), (x * transform.adjoint(z)).sum(-1))


def test_waveft_shares_its_parameters_out_as_peft() -> None:
    counts = []
    for library in (fastpeft, peft):
        base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 40), nn.Linear(40, 2))
        config = library.WaveFTConfig(target_modules=["0", "1", "2"], n_frequency=20, proportional_parameters=True)
        model = library.get_peft_model(base, config)
        counts.append([p.numel() for p in model.parameters() if p.requires_grad])
    assert counts[0] == counts[1]
    assert len(set(counts[0])) == 3


@pytest.mark.parametrize(("name", "options", "layer", "match"), [
    ("OFTConfig", {"r": 2}, "lin", "not both"),
    ("OFTConfig", {"oft_block_size": 0}, "lin", "must be non-zero"),
    ("OFTConfig", {"num_cayley_neumann_terms": 0}, "lin", "num_cayley_neumann_terms"),
    ("OFTConfig", {}, "groups", "2 groups"),
    ("BOFTConfig", {"boft_block_num": 2}, "lin", "not both"),
    ("BOFTConfig", {"boft_block_size": 5}, "lin", "must be divisible by boft_block_size"),
    ("BOFTConfig", {"boft_n_butterfly_factor": 0}, "lin", "boft_n_butterfly_factor"),
    ("BOFTConfig", {"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "lin", "even block size"),
    ("BOFTConfig", {"boft_n_butterfly_factor": 3}, "lin", "divisible by 4"),
    ("BOFTConfig", {}, "embedding", "cannot adapt"),
    ("HRAConfig", {"r": 0}, "lin", "positive integer"),
    ("RoadConfig", {}, "lin", "divisible by group_size"),
    ("RoadConfig", {"group_size": 3}, "lin", "multiple of 2"),
    ("RoadConfig", {"variant": "road_3"}, "lin", "road_4"),
    ("PsoftConfig", {}, "lin", "less than or equal to min"),
    ("PsoftConfig", {"psoft_svd": "some"}, "lin", "psoft_svd"),
    ("OSFConfig", {"effective_rank": 1.0}, "lin", "leave something to train"),
    ("OSFConfig", {"effective_rank": 0}, "lin", "at least 1"),
    ("OSFConfig", {}, "conv2", "cannot adapt"),
    ("FourierFTConfig", {}, "lin", "at most in_features"),
    ("WaveFTConfig", {"wavelet_family": "db11"}, "lin", "not supported"),
    ("WaveFTConfig", {"n_frequency": 0}, "lin", "positive integer"),
    ("C3AConfig", {}, "lin", "factor of the input size"),
    ("C3AConfig", {"init_weights": "zeros", "block_size": 4}, "lin", "Unknown init_weights"),
])  # fmt: skip
def test_errors(name: str, options: dict[str, Any], layer: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_of(fastpeft, layer, name, options)


@pytest.mark.parametrize("name", ["OFT", "BOFT", "PSOFT", "OSF", "FOURIERFT", "WAVEFT", "C3A"])
def test_a_quantised_base_is_adapted_by_its_decoded_weight(name: str) -> None:
    method, layer = get_method(name), make_layer("nf4")
    add_adapter(layer, "a", method, method.config_class(**method.examples[0]))
    layer.set_adapter("a")
    w, b = layer.merged_weight(["a"])
    x = torch.randn(3, 24)
    assert torch.allclose(layer(x), nn.functional.linear(x, w, b), atol=1e-4)


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
