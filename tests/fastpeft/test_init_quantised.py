"""Initialisations that read or change the base weight, on 4-bit and 8-bit bases, ours and bitsandbytes'."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.layer.layer import AdapterLayer
from safetensors.torch import save_file
from torch import Tensor

tools = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))
X, model, wrap, train, tensors = (tools[name] for name in ("X", "model", "wrap", "train", "tensors"))
assert_matches, assert_near, bnb, nf4 = (tools[name] for name in ("assert_matches", "assert_near", "bnb", "nf4"))
BASES = {"nf4": nf4, "bnb-4bit": lambda: bnb("4bit"), "bnb-8bit": lambda: bnb("8bit")}


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
                                     {"kasa_config": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_quantised_bases_are_requantised_and_restored(make: Any, options: dict[str, Any]) -> None:
    base = make()
    found = AdapterLayer(base.first)
    w = found.base.read()[0].clone()
    before = tensors(base.first)
    adapted = wrap(fastpeft, base, **options)
    layer = adapted.base_model.model.first
    edited = layer.base.read()[0]
    wanted = layer.base_edits["default"](w)
    assert 0 < (edited - wanted).norm() / wanted.norm() < 0.15
    assert (edited - wanted).norm() < (edited - w).norm()
    y = adapted(X)
    expected = torch.tanh(X @ (edited + layer.get_delta_weight("default")).T + layer.bias)
    assert_near(y, adapted.base_model.model.second(expected))
    adapted.unload()
    after = tensors(base.first)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if isinstance(before[key], Tensor))


def test_a_plain_lora_of_a_quantised_base(tmp_path: Any) -> None:
    """Requantising the rest of a weight leaves an error, which a warning says."""
    adapted = wrap(fastpeft, nf4(), init_lora_weights="pissa")
    adapted.save_pretrained(tmp_path / "initial")
    train(adapted)
    with pytest.warns(fastpeft.PeftWarning, match="quantised"):
        adapted.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = fastpeft.PeftModel.from_pretrained(nf4(), tmp_path)
    got, expected = (m.base_model.model.first for m in (loaded, adapted))
    s = expected.base_edits["default"]
    trained, taken = expected.get_delta_weight("default"), s.p @ s.q
    delta = trained - taken
    terms = 2 * s.q.shape[0]
    assert_near(got.get_delta_weight("default"), delta, terms * float(taken.abs().max() / delta.abs().max()))
    before = nf4()(X)
    assert (loaded(X) - adapted(X)).norm() < (before - adapted(X)).norm()


def test_loading_on_a_quantised_base_takes_the_same_from_it(tmp_path: Any) -> None:
    for options in ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": True}):
        adapted = wrap(fastpeft, nf4(), **options)
        train(adapted)
        adapted.save_pretrained(tmp_path)
        assert_matches(fastpeft.PeftModel.from_pretrained(nf4(), tmp_path)(X), adapted(X), adapted(X))


def test_a_loftq_adapter_on_the_base_that_it_was_made_for(tmp_path: Any) -> None:
    adapted = wrap(fastpeft, model(), init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    train(adapted)
    adapted.save_pretrained(tmp_path)
    assert_matches(fastpeft.PeftModel.from_pretrained(model(), tmp_path)(X), adapted(X), adapted(X))
    fastpeft.PeftModel.from_pretrained(nf4(), tmp_path)  # quantised as it is


@pytest.mark.parametrize(("name", "init", "dora"), [
    (name, init, dora) for name in BASES for init in ("corda", "lora_ga", "eva", "mica", "pissa_niter_2")
    for dora in ((False,) if init == "mica" else (False, True))  # MiCA is a variant by itself, as DoRA is
    # On the CPU bitsandbytes' own forward in evaluation takes no layer of 20 outputs.
    if (name, init) != ("bnb-4bit", "corda")
])  # fmt: skip
def test_every_initialisation_starts_near_the_base_and_goes_back(name: str, init: str, dora: bool) -> None:
    """The rest of the weight is quantised again; no more than that keeps the start from the base.

    DoRA begins with the norms of the base's rows: it moves them by less than requantising did."""
    base = BASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = fastpeft.LoraConfig(
            r=4, target_modules=["first"], init_lora_weights=init, use_dora=dora,
            lora_ga_config=fastpeft.LoraGAConfig(scale="gd_scale") if init == "lora_ga" else None,
        )  # fmt: skip
    before, w = tensors(base.first), AdapterLayer(base.first).base.read()[0].clone()
    if init == "corda":
        fastpeft.preprocess_corda(base, config, lambda: base(X))
    if init == "lora_ga":
        fastpeft.preprocess_loraga(base, config, lambda: (base(X) - 1).square().mean().backward())
    adapted = fastpeft.get_peft_model(base, config)
    layer = adapted.base_model.model.first
    assert bool(layer.base_edits) == (init not in ("eva", "mica"))
    now = layer.merged_weight(["default"])[0]
    wanted = layer.base_edits["default"](w) if layer.base_edits else w
    requantised = (layer.base.read()[0] - wanted).norm()
    rounding = w.shape[1] * torch.finfo(w.dtype).eps * w.norm()
    assert (now - w).norm() <= (2 if dora else 1) * requantised + rounding
    adapted(X).square().mean().backward()
    assert layer.lora_A["default"].weight.grad is not None
    adapted.unload()
    after = tensors(base.first)
    assert all(torch.equal(after[key], before[key]) for key in before if isinstance(before[key], Tensor))


def test_loftq_gives_a_dora_the_norms_of_what_it_starts(tmp_path: Any) -> None:
    save_file(model().state_dict(), tmp_path / "model.safetensors")
    lora, dora = (wrap(fastpeft, nf4(), lora_alpha=4, use_dora=dora) for dora in (False, True))
    before = tensors(dora)
    fastpeft.replace_lora_weights_loftq(dora, str(tmp_path), callback=lambda *_: False)
    after = tensors(dora)
    assert all(torch.equal(after[key], before[key]) for key in before if isinstance(before[key], Tensor))
    for adapted in (lora, dora):
        fastpeft.replace_lora_weights_loftq(adapted, str(tmp_path))
    assert_near(dora(X), lora(X))
