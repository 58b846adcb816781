"""Tensors that all layers of an adapter share: where they live, when they train, and what files hold of them."""

from __future__ import annotations

import copy
import json
import pickle
import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.config.base import CONFIG_NAME
from fastpeft.files.checks import KeyMismatchError
from fastpeft.saving.folder import SAFETENSORS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("shared_tools.py")))
CASES, IDS, Net, assert_same, configuration, model, pair, spread, trained = (
    tools[name]
    for name in ("CASES", "IDS", "Net", "assert_same", "configuration", "model", "pair", "spread", "trained")
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("case", [*CASES])
def test_layers_hold_one_and_the_same_tensor(case):
    base = nn.Sequential()
    base.add_module("up", nn.Linear(16, 24))
    base.add_module("down", nn.Linear(24, 16))
    m = model(fastpeft, case, base=base, target_modules=["up", "down"])
    layers = [layer for _, layer in m.base_model.adapter_layers()]
    containers = [getattr(layer, name) for layer in layers for name in layer.shared]
    if CASES[case][0] != "FROD":  # there, layers of different roles share nothing
        assert len({id(c) for c in containers}) == len(layers[0].shared)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), copy.deepcopy(m).double().float()):
        copied = [getattr(layer, n) for _, layer in other.base_model.adapter_layers() for n in layer.shared]
        assert len({id(c) for c in copied}) == len({id(c) for c in containers})
        assert not {id(c) for c in copied} & {id(c) for c in containers}
        for key, value in fastpeft.get_peft_model_state_dict(other).items():
            assert_same_bits(value, fastpeft.get_peft_model_state_dict(m)[key])


@pytest.mark.parametrize("case", ["vblora", "unilora", "tinylora", "vera", "pvera"])
def test_a_model_without_a_tuner_has_what_is_shared_under_one_key(case):
    """The keys that transformers' `load_adapter` looks for, and its renaming of those of a file."""
    core = pytest.importorskip("transformers.core_model_loading")
    from fastpeft.utils.transformers_weight_conversion import build_peft_weight_mapping

    m, config = model(fastpeft, case).eval(), configuration(fastpeft, case)
    spread(m)
    torch.manual_seed(0)
    plain = fastpeft.inject_adapter_in_model(config, Net(), "a").eval()
    mapping = build_peft_weight_mapping(None, "a", peft_config=config)
    state = {core.apply_renamings(k, mapping): t for k, t in fastpeft.get_peft_model_state_dict(m).items()}
    assert state.keys() == {key for key in plain.state_dict() if ".a" in key}
    assert "shared_adapters" in {key.split(".")[0] for key in state} <= {"up", "down", "shared_adapters"}
    base = {k.replace("base_layer.", ""): t for k, t in m.get_base_model().state_dict().items() if "default" not in k}
    whole = plain.state_dict()
    whole |= {k: base[k.replace("base_layer.", "")] for k in whole if k.replace("base_layer.", "") in base}
    plain.load_state_dict({**whole, **state})
    torch.manual_seed(1)
    wanted = m(IDS)
    for other in (plain, copy.deepcopy(plain)):
        torch.manual_seed(1)
        assert_same_bits(other(IDS), wanted)


@pytest.mark.parametrize("case", ["vblora", "unilora", "tinylora"])
def test_what_is_shared_and_trained_goes_on_and_off_with_its_adapter(case):
    m = model(fastpeft, case)
    m.add_adapter("b", configuration(fastpeft, case))
    name = {"vblora": "vblora_vector_bank", "unilora": "unilora_theta_d", "tinylora": "tinylora_v"}[case]

    def trains() -> dict[str, bool]:
        container = getattr(m.base_model, name)
        return {a: all(p.requires_grad for p in container.parameters_of(a)) for a in container}

    assert trains() == {"default": True, "b": False}
    m.set_adapter("b")
    assert trains() == {"default": False, "b": True}
    m.set_adapter("b", inference_mode=True)
    assert trains() == {"default": False, "b": False}
    m.set_requires_grad("default")
    assert trains() == {"default": True, "b": False}
    m.set_adapter(["default", "b"])
    with m.disable_adapter():
        assert trains() == {"default": False, "b": False}
    assert trains() == {"default": True, "b": True}
    m.delete_adapter("default")
    assert trains() == {"b": True}
    m(IDS).sum().backward()
    assert all(p.grad is not None for p in trained(m).values())
    frozen = model(fastpeft, case, inference_mode=True)
    assert not trained(frozen)


@pytest.mark.parametrize("case", CASES)
def test_adapters_have_projections_of_their_own(case, tmp_path):
    """PEFT refuses another seed, and gives a second adapter the first one's projections, whatever its size."""
    alone = model(fastpeft, case)
    seed = {"UNILORA": "proj_seed", "TINYLORA": "projection_seed"}.get(CASES[case][0], "projection_prng_key")
    more = {} if CASES[case][0] == "VBLORA" else {seed: 5}
    both = model(fastpeft, case, **more)
    torch.manual_seed(1)
    both.add_adapter("b", configuration(fastpeft, case))
    both.set_adapter("b")
    spread(alone)
    for memory, value in fastpeft.get_peft_model_state_dict(alone).items():
        assert value.shape == fastpeft.get_peft_model_state_dict(both, adapter_name="b")[memory].shape
    fastpeft.set_peft_model_state_dict(both, fastpeft.get_peft_model_state_dict(alone), "b")
    assert_same(both.eval()(IDS), alone.eval()(IDS), case)
    before = {k: v.clone() for k, v in fastpeft.get_peft_model_state_dict(both).items()}
    both.delete_adapter("b")
    after = fastpeft.get_peft_model_state_dict(both)
    assert after.keys() == before.keys()
    for key, value in after.items():
        assert_same_bits(value, before[key])
    assert not [key for key in both.state_dict() if ".b" in key.replace(".bias", "").replace(".base", "")]


@pytest.mark.parametrize("case", ["vera", "pvera", "randlora", "frod"])
def test_equal_projections_are_kept_once(case, tmp_path):
    m = model(fastpeft, case)
    m.add_adapter("b", configuration(fastpeft, case))
    m.save_pretrained(tmp_path)
    m.load_adapter(tmp_path, "c")
    m.add_adapter("d", configuration(fastpeft, case, projection_prng_key=9))
    for _, layer in m.base_model.adapter_layers():
        for name in layer.shared:
            entries = {a: t.data_ptr() for a, t in getattr(layer, name).items()}
            assert entries["default"] == entries["b"] == entries["c"]
            if name not in ("frod_V", "frod_s_size"):
                assert entries["d"] != entries["c"]
    # New values for one of them are no other's.
    state = fastpeft.get_peft_model_state_dict(m, adapter_name="b")
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    before = m.eval()(IDS).detach()
    fastpeft.set_peft_model_state_dict(m, changed, "b")
    assert_same_bits(m(IDS).detach(), before)


def test_a_second_adapter_may_be_larger_or_smaller_than_the_first():
    m = model(fastpeft, "vera", target_modules=["proj"])
    m.add_adapter("b", configuration(fastpeft, "vera", r=2, projection_prng_key=3))
    m.set_adapter(["default", "b"])
    spread(m)
    y = m.eval()(IDS)
    assert_no_worse(m.merge_and_unload()(IDS), y.detach(), y.detach().double(), y.detach().double().abs() * 8 + 1)


@pytest.mark.parametrize("case", CASES)
def test_injected_without_a_tuner(case, tmp_path):
    """PEFT refuses: there would be nowhere for the shared tensors to live."""
    kind = CASES[case][0]
    with pytest.raises(ValueError, match="uses shared state") if kind != "RANDLORA" else warnings.catch_warnings():
        peft.inject_adapter_in_model(configuration(peft, case), Net())
    whole = model(fastpeft, case)
    spread(whole)
    state = fastpeft.get_peft_model_state_dict(whole)
    torch.manual_seed(0)
    bare = fastpeft.inject_adapter_in_model(configuration(fastpeft, case), Net())
    result = fastpeft.set_peft_model_state_dict(bare, state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(bare.eval()(IDS), whole.eval()(IDS), case)
    mine = fastpeft.get_peft_model_state_dict(bare)
    names = {key.removeprefix("base_model.model.").removeprefix("base_model.") for key in state}
    assert mine.keys() == names - {"randlora_A", "randlora_B"}  # those are in every layer, too
    assert fastpeft.set_peft_model_state_dict(whole, mine).missing_keys == []
    # A model that has been injected into and then gets a tuner.
    model_ = fastpeft.get_peft_model(bare, fastpeft.LoraConfig(target_modules=["up"]), "lora")
    assert fastpeft.get_peft_model_state_dict(model_).keys() == state.keys()
    bare.peft_config.clear()


@pytest.mark.parametrize("case", CASES)
def test_empty_tensors_until_a_file_fills_them(case):
    whole = model(fastpeft, case)
    spread(whole)
    torch.manual_seed(0)
    low = fastpeft.get_peft_model(Net(), configuration(fastpeft, case), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in trained(low).values())
    result = fastpeft.set_peft_model_state_dict(
        low, fastpeft.get_peft_model_state_dict(whole), low_cpu_mem_usage=True
    )
    assert result.missing_keys == []
    assert not [n for n, t in [*low.named_parameters(), *low.named_buffers()] if t.is_meta]
    assert_same(low.eval()(IDS), whole.eval()(IDS), case)


# Files


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / SAFETENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / SAFETENSORS_NAME)
    (folder / "fastpeft_manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize("case", ["vera", "pvera", "randlora", "tinylora", "frod"])
def test_missing_projections_are_an_error_and_superfluous_ones_are_passed_over(case, tmp_path):
    m = model(fastpeft, case)
    spread(m)
    m.save_pretrained(tmp_path)
    kept = load_file(tmp_path / SAFETENSORS_NAME)
    names = ("vera_A", "vera_B", "pvera_A", "pvera_B", "randlora_A", "randlora_B", "tinylora_P", "frod_V", "frod_s")
    projections = {key for key in kept if any(name in key for name in names)}
    rewrite(tmp_path, lambda tensors: [tensors.pop(key) for key in projections])
    base = Net()
    torch.manual_seed(0)
    before = base(IDS).detach()
    with pytest.raises(KeyMismatchError, match="missing: base_model"):
        fastpeft.PeftModel.from_pretrained(base, tmp_path)
    assert_same_bits(base(IDS).detach(), before)
    # The same file, whose configuration says that they are computed.
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, "save_projection": False}))
    torch.manual_seed(0)
    again = fastpeft.PeftModel.from_pretrained(Net(), tmp_path)
    assert_same_bits(again(IDS).detach(), m.eval()(IDS).detach())
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.zeros_like(kept[key]) for key in projections}))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="are computed, so those of the file are passed over"):
        again = fastpeft.PeftModel.from_pretrained(Net(), tmp_path)
    assert_same_bits(again(IDS).detach(), m(IDS).detach())


def test_randlora_needs_its_bases_once(tmp_path):
    """PEFT writes the bases again for every layer: for a large model, hundreds of times."""
    ours, theirs = pair("randlora")
    spread(ours, theirs)
    theirs.save_pretrained(tmp_path)
    expected = theirs.eval()(IDS).detach()
    rewrite(tmp_path, lambda tensors: [tensors.pop(k) for k in list(tensors) if "model.model" in k and "_A" in k])
    rewrite(tmp_path, lambda tensors: [tensors.pop(k) for k in list(tensors) if "down.randlora_B" in k])
    for library in (fastpeft, peft):
        torch.manual_seed(0)
        y = library.PeftModel.from_pretrained(Net(), tmp_path)(IDS).detach()
        assert_no_worse(y, expected, expected.double(), 8 * expected.double().abs() + 1)


@pytest.mark.parametrize(
    ("case", "part", "value"),
    [("vblora-topk", "topk_indices", 7), ("unilora-indices", "indices_A", 9), ("unilora-indices", "indices_B", -1),
     ("frod", "s_indices.up", 16), ("frod", "s_size.up", 17)],
)  # fmt: skip
def test_positions_out_of_range_are_refused(case, part, value, tmp_path):
    m = model(fastpeft, case)
    m.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: [t.view(-1)[-1:].fill_(value) for key, t in tensors.items() if part in key])
    base = Net()
    modules = dict(base.named_modules())
    with pytest.raises(ValueError, match="should be indices"):
        fastpeft.PeftModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == modules


def test_vblora_in_its_small_format(tmp_path):
    ours, theirs = pair("vblora-topk")
    spread(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / n / SAFETENSORS_NAME) for n in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for key in mine:
        assert_same_bits(mine[key], other[key])
    expected = ours.eval()(IDS).detach()
    for library, folder in ((fastpeft, "theirs"), (peft, "ours")):
        torch.manual_seed(0)
        loaded = library.PeftModel.from_pretrained(Net(), tmp_path / folder)
        y = loaded(IDS).detach()
        assert_no_worse(y, expected, expected.double(), 8 * expected.double().abs() + 1)
        with pytest.raises(RuntimeError, match="Found infinity values in VB-LoRA logits"):
            loaded.train()(IDS)
    assert ours.get_nb_savable_parameters() == theirs.get_nb_savable_parameters()
    plain = pair("vblora")
    assert plain[0].get_nb_savable_parameters() == plain[1].get_nb_savable_parameters()


def test_vblora_prints_what_it_would_save(capsys):
    for m in pair("vblora-topk"):
        m.print_savable_parameters()
    ours, theirs = capsys.readouterr().out.strip().split("\n")
    assert ours == theirs
