"""Adapters that take something from the base weight: the same start as PEFT's, the same model, and the way back."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.methods.base_edit import LowRankEdit
from fastpeft.weights.dense import LinearWeight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))
X, model, wrap, train, tensors = (tools[name] for name in ("X", "model", "wrap", "train", "tensors"))
assert_same, assert_matches, assert_near = (tools[name] for name in ("assert_same", "assert_matches", "assert_near"))
bnb, nf4 = tools["bnb"], tools["nf4"]
RESIDUAL = ["pissa", "pissa_niter_3", "olora"]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"rank_pattern": {"second": 2}}])
@pytest.mark.parametrize("init", RESIDUAL)
def test_a_seed_gives_the_numbers_of_peft(init: str, options: dict[str, Any]) -> None:
    ours, theirs = (wrap(lib, model(), init_lora_weights=init, **options) for lib in (fastpeft, peft))
    assert_same(tensors(ours), tensors(theirs))
    base = model()
    assert_matches(ours(X), base(X), copy.deepcopy(base).double()(X.double()))
    for adapted in (ours, theirs, exact := copy.deepcopy(theirs).double()):
        train(adapted)
    assert_matches(ours(X), theirs(X), exact(X.double()))


@pytest.mark.parametrize("init", RESIDUAL)
def test_layers_that_store_their_weight_transposed(init: str) -> None:
    """PEFT decomposes the transposed weight for PiSSA; its OLoRA takes it as it is stored, and fails."""
    base = model(transposed=True)
    ours = wrap(fastpeft, model(transposed=True), init_lora_weights=init)
    assert_matches(ours(X), base(X), copy.deepcopy(base).double()(X.double()))
    if init == "olora":
        return
    theirs = wrap(peft, model(transposed=True), init_lora_weights=init)
    got, expected = (tensors(m)["base_model.model.second.base_layer.weight"] for m in (ours, theirs))
    assert_near(got, expected)


def test_half_precision_starts_closer_than_peft() -> None:
    """The base keeps what A and B lose when they are rounded."""
    base = model().bfloat16()
    w = base.first.weight.double()
    errors = []
    for lib in (fastpeft, peft):
        state = tensors(wrap(lib, copy.deepcopy(base), init_lora_weights="pissa", r=8))
        start = "base_model.model.first."
        a, b = (state[f"{start}lora_{x}.default.weight"].double() for x in "AB")
        assert state[f"{start}lora_A.default.weight"].dtype is torch.float32
        errors.append((state[f"{start}base_layer.weight"].double() + b @ a - w).norm())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("options", [*({"init_lora_weights": i} for i in RESIDUAL), {"kasa_config": True}], ids=str)
class TestTheWayBack:
    def test_unload_gives_the_base_back(self, options: dict[str, Any]) -> None:
        base = model()
        before, parameters = tensors(base), dict(base.named_parameters())
        adapted = wrap(fastpeft, base, **options)
        assert adapted.base_model.model.first.base_layer.weight is not parameters["first.weight"]
        after = adapted.unload()
        assert_same(tensors(after), before)
        assert all(p is parameters[name] for name, p in after.named_parameters())

    def test_deleting_restores_and_keeps_what_others_took(self, options: dict[str, Any]) -> None:
        base = model()
        before = base.first.weight.detach().clone()
        adapted = wrap(fastpeft, base, **options)
        torch.manual_seed(2)
        adapted.add_adapter("other", fastpeft.LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa"))
        layer = adapted.base_model.model.first
        other = layer.base_edits["other"]
        adapted.delete_adapter("default")
        assert_same_bits(layer.base_layer.weight.detach(), other(before))
        assert not layer.base_layer.weight.requires_grad
        adapted.delete_adapter("other")
        assert_same_bits(layer.base_layer.weight.detach(), before)
        assert not layer.base_layer.weight.requires_grad
        assert not layer.base_edits
        assert layer._unedited is None

    def test_deleting_one_while_another_is_merged(self, options: dict[str, Any]) -> None:
        base = model()
        adapted = wrap(fastpeft, base, **options)
        adapted.add_adapter("plain", fastpeft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        adapted.set_adapter("plain")
        adapted.merge_adapter()
        layer = adapted.base_model.model.first
        expected = layer.merged_weight(["plain"], (model().first.weight, None))[0]
        layer.delete_adapter("default")
        assert layer.merged_adapters == ["plain"]
        assert_same_bits(layer.base_layer.weight.detach(), expected.detach())
        layer.unmerge()
        assert_same_bits(layer.base_layer.weight.detach(), model().first.weight.detach())

    def test_merging_and_unmerging_leave_the_edited_base(self, options: dict[str, Any]) -> None:
        adapted = wrap(fastpeft, model(), **options)
        train(adapted)
        before, y = tensors(adapted), adapted(X)
        adapted.merge_adapter()
        adapted.unmerge_adapter()
        assert_same(tensors(adapted), before)
        merged = adapted.merge_and_unload()
        assert_matches(merged(X), y, copy.deepcopy(merged).double()(X.double()).float())

    def test_a_moved_model_gets_its_weight_in_its_dtype(self, options: dict[str, Any]) -> None:
        base = model()
        before = base.first.weight.detach().double()
        after = wrap(fastpeft, base, **options).double().unload()
        assert_same_bits(after.first.weight.detach(), before)

    def test_copies_can_be_restored_too(self, options: dict[str, Any]) -> None:
        base = model()
        before = tensors(base)
        assert_same(tensors(copy.deepcopy(wrap(fastpeft, base, **options)).unload()), before)


def test_a_failing_edit_leaves_every_weight_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model()
    before, parameters = tensors(base), dict(base.named_parameters())
    written = []

    def write(weight: LinearWeight, w: Tensor, b: Tensor | None) -> None:
        if written:
            raise MemoryError
        written.append(weight.module)
        weight.module._parameters["weight"] = nn.Parameter(w)

    monkeypatch.setattr(LinearWeight, "write", write)
    with pytest.raises(MemoryError):
        wrap(fastpeft, base, init_lora_weights="pissa")
    assert written == [base.first]
    assert isinstance(base.second, nn.Linear)
    assert_same(tensors(base), before)
    assert all(p is parameters[name] and p.requires_grad for name, p in base.named_parameters())


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"kasa_config": True}], ids=str)
def test_a_failed_load_leaves_the_base_as_it_was(options: dict[str, Any], tmp_path: Any) -> None:
    wrap(fastpeft, model(), **options).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    broken = load_file(file)
    broken.pop("base_model.model.second.lora_B.weight")
    save_file(broken, file, metadata={"format": "pt"})
    base = model()
    before, parameters = tensors(base), dict(base.named_parameters())
    with pytest.raises(ValueError, match=r"second\.lora_B"):
        fastpeft.PeftModel.from_pretrained(base, tmp_path)
    assert_same(tensors(base), before)
    assert all(p is parameters[name] and p.requires_grad for name, p in base.named_parameters())


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": i} for i in ("pissa", "olora")] + [{"kasa_config": 1}], ids=str
)
def test_trained_adapters_go_both_ways(options: dict[str, Any], tmp_path: Any) -> None:
    """Loading takes from the base again what the adapter took when it was made."""
    ours, theirs = (wrap(lib, model(), **options) for lib in (fastpeft, peft))
    for adapted, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        train(adapted)
        adapted.save_pretrained(folder)
        for lib in (fastpeft, peft):
            loaded = lib.PeftModel.from_pretrained(model(), folder)
            assert_matches(loaded(X), adapted(X), copy.deepcopy(adapted).double()(X.double()))
    loaded = fastpeft.PeftModel.from_pretrained(model(), tmp_path / "ours")
    assert_same(tensors(loaded.unload()), tensors(model()))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"second": 2}, "lora_alpha": 3}], ids=str
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_saving_as_a_plain_lora_of_the_original_base(init: str, options: dict[str, Any], tmp_path: Any) -> None:
    ours, theirs = (wrap(lib, model(), init_lora_weights=init, **options) for lib in (fastpeft, peft))
    for adapted, folder in ((ours, tmp_path / "fastpeft"), (theirs, tmp_path / "peft")):
        adapted.save_pretrained(folder / "initial")
    train(theirs)
    ours.load_state_dict(theirs.state_dict())
    for adapted, folder in ((ours, tmp_path / "fastpeft"), (theirs, tmp_path / "peft")):
        adapted.save_pretrained(folder, path_initial_model_for_weight_conversion=str(folder / "initial"))
        config = fastpeft.LoraConfig.from_pretrained(folder)
        assert (config.r, config.init_lora_weights) == (8, True)
        for reader in (fastpeft, peft):
            loaded = reader.PeftModel.from_pretrained(model(), folder)
            assert_matches(loaded(X), adapted(X), copy.deepcopy(adapted).double()(X.double()))
    assert_same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fastpeft", "peft")))
    ours.save_pretrained(tmp_path / "remembered", path_initial_model_for_weight_conversion=True)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "remembered")
    assert_matches(loaded(X), ours(X), copy.deepcopy(ours).double()(X.double()))


def test_kasa_as_a_plain_lora(tmp_path: Any) -> None:
    adapted = wrap(fastpeft, model(), kasa_config=True)
    train(adapted)
    adapted.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=True)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert loaded.peft_config["default"].kasa_config is None
    assert_matches(loaded(X), adapted(X), copy.deepcopy(adapted).double()(X.double()))


@pytest.mark.parametrize(("options", "message"), [
    ({"use_dora": True}, "cannot be saved as a plain LoRA"),
    ({"use_rslora": True, "rank_pattern": {"second": 2}}, "scalings would change"),
])  # fmt: skip
def test_what_has_no_plain_form(options: dict[str, Any], message: str, tmp_path: Any) -> None:
    adapted = wrap(fastpeft, model(), init_lora_weights="pissa", **options)
    with pytest.raises(ValueError, match=message):
        adapted.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=True)


def test_dora_starts_as_the_base_as_well() -> None:
    base = model()
    adapted = wrap(fastpeft, model(), init_lora_weights="pissa", use_dora=True)
    assert_matches(adapted(X), base(X), copy.deepcopy(base).double()(X.double()))


def test_kasa_regularises_as_in_peft() -> None:
    ours, theirs = (wrap(lib, model(), kasa_config=True) for lib in (fastpeft, peft))
    assert_near(ours._get_kasa_loss(), theirs.base_model._get_kasa_loss())
    assert wrap(fastpeft, model())._get_kasa_loss() == 0.0


def test_tied_weights_change_in_one_place_only() -> None:
    """PEFT writes into the tensor that both share."""
    base = model()
    base.twin = nn.Linear(24, 20)
    base.twin.weight = base.first.weight
    before = base.twin.weight.detach().clone()
    adapted = wrap(fastpeft, base, init_lora_weights="pissa")
    assert_same_bits(base.twin.weight.detach(), before)
    restored = adapted.unload()
    assert restored.first.weight is restored.twin.weight


def test_low_rank_edit_is_what_it_says() -> None:
    w, p, q = torch.randn(6, 5), torch.randn(6, 2), torch.randn(2, 5)
    edit = LowRankEdit(p, q)
    assert_same_bits(edit(w), w - p @ q)
    assert_same_bits(edit(w.double()), w.double() - p.double() @ q.double())


@pytest.mark.parametrize(("options", "message"), [
    ({"init_lora_weights": "pissa", "r": 17}, "rank of at most 16"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga_config"),
    ({"init_lora_weights": "pissa_niter_99999"}, "iterations"),
    ({"init_lora_weights": "pizza"}, "unknown"),
    ({"init_lora_weights": "pissa", "lora_bias": True}, "lora_bias"),
    ({"init_lora_weights": "mica", "r": 17}, "`r` <= min.* = 16"),
    ({"kasa_config": True, "r": 16}, "smaller than"),
    ({"init_lora_weights": "pissa", "kasa_config": True}, "cannot be combined"),
    ({"init_lora_weights": "loftq"}, "loftq_config"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "loftq_bits"),
    ({"init_lora_weights": "corda"}, "preprocess_corda"),
])  # fmt: skip
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    base = model()
    before = tensors(base)
    with pytest.raises(ValueError, match=message):
        wrap(fastpeft, base, **options)
    assert_same(tensors(base), before)


def test_an_edit_needs_an_unmerged_base() -> None:
    adapted = wrap(fastpeft, model(), init_lora_weights=False)
    adapted.merge_adapter()
    before = tensors(adapted)
    other = fastpeft.LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="unmerge_adapter"):
        adapted.add_adapter("b", other)
    assert_same(tensors(adapted), before)
    adapted.unmerge_adapter()
    with pytest.warns(fastpeft.PeftWarning, match="other adapters act"), \
         pytest.warns(fastpeft.PeftWarning, match="PiSSA changes the base weights of the model and should thus not be"):
        adapted.add_adapter("b", other)


def test_mica_is_peft_s_and_freezes_b() -> None:
    ours, theirs = (wrap(lib, model(), init_lora_weights="mica") for lib in (fastpeft, peft))
    assert_same(tensors(ours), tensors(theirs))
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert all("lora_A" in n for n in trained[0])
    train(ours)
    train(theirs)
    assert_matches(ours(X), theirs(X), copy.deepcopy(theirs).double()(X.double()))


def test_a_second_kasa_of_the_same_rank_leaves_the_base_alone() -> None:
    adapted = wrap(fastpeft, model(), kasa_config=True)
    before = tensors(adapted)["base_model.model.first.base_layer.weight"]
    for name, r in (("same", 4), ("more", 5)):
        adapted.add_adapter(name, fastpeft.LoraConfig(r=r, target_modules=["first"], kasa_config=fastpeft.KasaConfig()))
        now = tensors(adapted)["base_model.model.first.base_layer.weight"]
        assert torch.equal(now, before) == (name == "same")
    adapted.delete_adapter("default")
    adapted.delete_adapter("more")
    assert_same_bits(tensors(adapted)["base_model.model.first.base_layer.weight"], before)


def test_nested_configurations_come_as_dictionaries_from_files() -> None:
    made = fastpeft.LoraConfig(kasa_config={}, init_lora_weights="eva", eva_config={"rho": 1.5})
    assert made.kasa_config == fastpeft.KasaConfig()
    assert made.eva_config.rho == 1.5
    for bad in ({"eva_config": {"rho": "x"}}, {"eva_config": {"unknown": 1}}, {"kasa_config": {"beta": -1}},
                {"eva_config": {"rho": 0.5}}, {"init_lora_weights": "loftq", "loftq_config": [4]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"config|non-negative|rho"):
            fastpeft.LoraConfig(**{"init_lora_weights": "eva", **bad})
    with pytest.raises(TypeError, match="eva_config"):
        fastpeft.LoraConfig(init_lora_weights="eva", eva_config=3)
    with pytest.warns(fastpeft.PeftWarning, match="ignored"):
        fastpeft.LoraConfig(eva_config=fastpeft.EvaConfig())
    with pytest.warns(fastpeft.PeftWarning, match="plain LoRA"):
        fastpeft.LoraConfig(init_lora_weights="pissa", use_rslora=True, rank_pattern={"a": 2})


def test_pissa_through_saved_checkpoints_of_the_whole_model() -> None:
    """Keys and values are those of the edited base, as in PEFT, so a checkpoint resumes."""
    adapted = wrap(fastpeft, model(), init_lora_weights="pissa")
    train(adapted)
    other = wrap(fastpeft, model(), init_lora_weights="pissa")
    other.load_state_dict(adapted.state_dict())
    assert_same_bits(other(X).detach(), adapted(X).detach())
    assert_same(tensors(other.unload()), tensors(model()))


@pytest.mark.parametrize("again", [{}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_an_adapter_in_the_place_of_another_starts_from_the_original(again: dict[str, Any], tmp_path: Path) -> None:
    """A model that is wrapped a second time, under the same name: PEFT takes from the base what is gone already."""
    base = model()
    expected, before = base(X), tensors(base)
    first = wrap(fastpeft, base, init_lora_weights="pissa")
    residual = tensors(first)
    with pytest.raises(ValueError, match="rank of at most"):
        wrap(fastpeft, base, init_lora_weights="pissa", r=17)
    assert_same(tensors(first), residual)
    second = wrap(fastpeft, base, **again)
    assert_near(second(X), expected)
    train(second)
    trained = second(X)
    second.save_pretrained(tmp_path)
    assert_near(fastpeft.PeftModel.from_pretrained(base, tmp_path)(X), trained)
    assert_same(tensors(second.unload()), before)


def test_a_lora_ga_is_loaded_onto_the_base_that_it_left(tmp_path: Path) -> None:
    base = model()
    options = fastpeft.LoraGAConfig(direction="ArBr")
    config = fastpeft.LoraConfig(r=4, target_modules=["first"], init_lora_weights="lora_ga", lora_ga_config=options)
    fastpeft.preprocess_loraga(base, config, lambda: base(X).square().mean().backward())
    made = fastpeft.get_peft_model(base, config)
    train(made)
    trained = made(X)
    made.save_pretrained(tmp_path)
    with pytest.warns(fastpeft.PeftWarning, match="right only on the residual base"):
        again = fastpeft.PeftModel.from_pretrained(base, tmp_path)
    assert_near(again(X), trained)
