"""OFT, BOFT, HRA, RoAd, PSOFT, OSF, FourierFT, WaveFT and C3A: options of training, sizes, places, and errors."""

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
from fastpeft.config.types import PeftWarning
from fastpeft.files.checks import KeyMismatchError
from fastpeft.methods.math.rotation import BlockDropout, skew
from fastpeft.methods.math.spectral import Fourier, Wavelet
from fastpeft.methods.math.wavelets import LOW_PASS, filters
from fastpeft.methods.oft import nearest_divisor
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from peft.tuners.waveft.wavelet import Wavelet as PeftWavelet
from torch import Tensor, nn

from peft_kernels import cayley
from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))
agree, input_of, model_of = (tools[n] for n in ("agree", "input_of", "model_of"))
assert_as_good, assert_same_start = tools["assert_as_good"], tools["assert_same_start"]
pair, randomise, run = (tools[n] for n in ("pair", "randomise", "run"))


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
    assert agree(own.weight, other.weight)
    assert not torch.equal(own.weight, before)


def test_osf_trains_in_the_complement_of_the_frozen_directions() -> None:
    for layer in ("lin", "wide"):
        model = model_of(fastpeft, layer, "OSFConfig", {"effective_rank": 5}).double()
        own = model.base_model.model.layer
        u, _, v = torch.linalg.svd(own.weight, full_matrices=False)
        for tokens in (2, 500):  # either order of the projection
            model.zero_grad()
            run(model, torch.randn(tokens, own.in_features, dtype=torch.float64))
            params = own.osf_svd_params["default"]
            du, dv = params["U_low"].grad, params["V_low"].grad
            rounding = 24 * torch.finfo(torch.float32).eps  # of a decomposition in float32
            assert (u[:, :5].T @ du).norm() <= rounding * du.norm()
            assert (dv @ v[:5].T).norm() <= rounding * dv.norm()
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


@pytest.mark.parametrize("rank", [1.0, 20, 21, 1000])
def test_osf_freezes_all_directions_where_the_rank_is_not_below_the_smaller_size(rank: float, tmp_path: Path) -> None:
    """As PEFT does, which does not warn: other layers train, and files go both ways."""
    def adapted(library: Any, folder: Path | None = None) -> Any:
        torch.manual_seed(0)
        base = nn.Sequential()
        base.add_module("small", nn.Linear(24, 20))
        base.add_module("large", nn.Linear(20, 40))
        if folder is not None:
            return library.PeftModel.from_pretrained(base, folder, is_trainable=True)
        return library.get_peft_model(base, library.OSFConfig(
            target_modules=["small", "large"], effective_rank=rank, rank_pattern={"large": 3}))  # fmt: skip

    with pytest.warns(PeftWarning, match=r"`effective_rank` \(.*\), clamped to 20, .* nothing is trained in it"):
        ours = adapted(fastpeft)
    theirs = adapted(peft)
    assert_same_start(ours, theirs)
    layer = ours.base_model.model.small
    assert layer.effective_rank == theirs.base_model.model.small.effective_rank == {"default": 20}
    assert [p.numel() for p in layer.osf_svd_params["default"].values()] == [0, 0, 0]
    randomise(ours, theirs)
    x = torch.randn(7, 24)
    exact = run(copy.deepcopy(theirs).double(), x.double())
    assert_as_good(run(ours, x), run(theirs, x), exact)
    for i, (model, other) in enumerate(((ours, peft), (theirs, fastpeft))):
        model.save_pretrained(tmp_path / str(i))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*clamped to")
            loaded = adapted(other, tmp_path / str(i))
        assert_same_bits(loaded.eval()(x), (theirs if other is peft else ours).eval()(x))
    before = layer.weight.clone()
    ours.merge_adapter()
    assert_same_bits(layer.weight.detach(), before.detach())


# Sizes, places and errors


def odd_base() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6))  # three blocks in the first layer, two in the second


def one_factor(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A model of PEFT without its CUDA extension, as on any CPU: one factor, and a configuration that says two."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
    options = {"boft_n_butterfly_factor": 2, "init_weights": False, **options}
    return peft.get_peft_model(odd_base(), peft.BOFTConfig(**options)).eval()


def test_boft_files_have_the_factors_that_their_tensors_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, x = one_factor(monkeypatch, target_modules=["0", "1"]), torch.randn(3, 12)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastpeft.PeftModel.from_pretrained(odd_base(), tmp_path / "theirs")
    assert agree(ours(x), theirs(x))
    assert ours.peft_config["default"].boft_n_butterfly_factor == 1
    ours.save_pretrained(tmp_path / "ours")
    assert agree(peft.PeftModel.from_pretrained(odd_base(), tmp_path / "ours")(x), theirs(x))
    tensors = fastpeft.get_peft_model_state_dict(ours)
    base = odd_base()  # as transformers' load_adapter does
    fastpeft.inject_adapter_in_model(
        fastpeft.PeftConfig.from_pretrained(tmp_path / "theirs"), base, state_dict=dict(tensors)
    )
    fastpeft.set_peft_model_state_dict(base, tensors)
    assert agree(base(x), theirs(x))


def test_boft_with_two_factors_takes_one_and_an_error_leaves_both(monkeypatch: pytest.MonkeyPatch) -> None:
    config = fastpeft.BOFTConfig(target_modules=["1"], boft_n_butterfly_factor=2, init_weights=False)
    ours, theirs = fastpeft.get_peft_model(odd_base(), config), one_factor(monkeypatch, target_modules=["1"])
    x = torch.randn(3, 12)
    before, held = ours(x), [*ours.parameters()]
    state = peft.get_peft_model_state_dict(theirs)
    key = "base_model.model.1.boft_s"
    with pytest.raises(KeyMismatchError, match="boft_s"):
        fastpeft.set_peft_model_state_dict(ours, {**state, key: state[key][:2]})
    assert all(new is old for new, old in zip(ours.parameters(), held, strict=True))
    assert_same_bits(ours(x), before)
    fastpeft.set_peft_model_state_dict(ours, state)
    assert agree(ours(x), theirs(x))
    assert ours.base_model.model[1].boft_R["default"].requires_grad


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
    assert agree(cayley(skew(vector, 5), terms), theirs)


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
    assert agree((transform(x) * z).sum(-1), (x * transform.adjoint(z)).sum(-1))


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
    ("RoadConfig", {"group_size": 3}, "lin", "divisible by 2 when using RoadLayer"),
    ("RoadConfig", {"variant": "road_3"}, "lin", "road_4"),
    ("PsoftConfig", {}, "lin", "less than or equal to min"),
    ("PsoftConfig", {"psoft_svd": "some"}, "lin", "psoft_svd"),
    ("OSFConfig", {"effective_rank": 0}, "lin", "at least 1"),
    ("OSFConfig", {}, "conv2", "cannot adapt"),
    ("FourierFTConfig", {}, "lin", "the product of the input and output dimensions"),
    ("WaveFTConfig", {"wavelet_family": "db11"}, "lin", "Invalid wavelet_family value: .db11."),
    ("WaveFTConfig", {"n_frequency": 0}, "lin", "positive integer"),
    ("C3AConfig", {}, "lin", "the input size is 24 and the block size is"),
    ("C3AConfig", {"init_weights": "zeros", "block_size": 4}, "lin", "Invalid init_weights value"),
])  # fmt: skip
def test_errors(name: str, options: dict[str, Any], layer: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_of(fastpeft, layer, name, options)
